"""Materials: class, colors, roughness, and whether they shine at night.

Every material has two sets of colors, so that a domain can differ in more than its light: `vivid`
is the paint box of a video game, `muted` what a camera sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from mfuser import IGNORE
from mfuser.config.classes import CITYSCAPES

SWATCHES = 8
"""Colors per set; shorter sets are repeated."""


class Glow(IntEnum):
    """The glow of a material in the dark."""

    NONE = 0
    WINDOW = 1
    """Some are lit, warm."""
    LAMP = 2
    HEADLIGHT = 3
    OWN = 4
    """In its own color: signals, rear lights."""
    FAINT = 5
    """Retroreflective: signs."""


@dataclass(frozen=True)
class Material:
    label: int
    vivid: tuple[str, ...]
    muted: tuple[str, ...]
    texture: float
    """Contrast of the surface grain."""
    jitter: float
    """The spread of objects' colors around their swatch."""
    glow: Glow


_TABLE: dict[str, Material] = {}


def _add(
    names: str,
    owner: str | None,
    vivid: str,
    muted: str = "",
    texture: float = 0.05,
    jitter: float = 0.05,
    glow: Glow = Glow.NONE,
) -> None:
    label = IGNORE if owner is None else CITYSCAPES.names.index(owner)
    for name in names.split():
        _TABLE[name] = Material(
            label, tuple(vivid.split()), tuple((muted or vivid).split()), texture, jitter, glow
        )


_PAINTS = "d42a26 f2f2ee 1d4fa8 f0b81c 20242c 3f9a4d b9bec4 e8692a"
_PAINTS_MUTED = "8f9397 d9dad8 2c2f34 6d2a2b 34465f b4b8bb 55585b 8a8371"
_GLASS, _GLASS_MUTED = "27384a 30465c", "22282d 39434a"
_TIRE = "17181b 1d1f22"

_add("sky", "sky", "6db1ea", "b9c4cc", 0, 0)
_add("asphalt", "road", "5b5e66 565a63 60626a", "6f6f6d 787673 636466", 0.1, 0.03)
_add("patch", "road", "4d5058 666971", "5c5c5b 807e7a", 0.1, 0.04)
_add("marking", "road", "efeee6", "c9c7bd bdbab0", 0.12, 0.03)
_add("yellow", "road", "eec23f", "b9a15f", 0.12, 0.03)
_add("manhole rail", "road", "44464b 3f3c3a", "4a4744 55504b", 0.1, 0.03)
_add("paving", "sidewalk", "b8a995 b3aca2 c2b29b", "958f86 a0998e 8b8885", 0.1, 0.03)
_add("joint", "sidewalk", "a0937f 9d968c", "817c75 8b8680", 0.1, 0.03)
_add("curb", "sidewalk", "d8d2c6", "a9a6a0", 0.1, 0.03)
_add(
    "facade",
    "building",
    "b9583f d9a066 c7835a e3cfa6 a8a39b d6b98a 9c6b58 c9c3b4",
    "8a5f50 a1917d 8f8a84 b5aa98 77716c 9b7f6c a79f93 6f625b",
    0.1,
    0.06,
)
_add("trim", "building", "efe7d6 cfc7b8", "b7b1a6 98938a", 0.06, 0.04)
_add("glass", "building", "3c5d7c 4b7191 345068", "3a444c 4b555c 59646b", 0.03, 0.05, Glow.WINDOW)
_add("shop", "building", "4d6f86 58809a", "4a5054 5b6265", 0.03, 0.06, Glow.WINDOW)
_add("awning", "building", "c23b2f 2f6db0 2f8a57 e0b040", "7d3c36 3f566b 4a6353 927f55", 0.06, 0.08)
_add("door", "building", "6b3a22 2d4a3c 3a3f55", "4e382b 363c38 3b3d44", 0.05, 0.06)
_add("roof", "building", "8d3f2f 6b4a42 59606b", "6a4b41 57504d 4f5358", 0.12, 0.05)
_add("stone", "wall", "a39683 94897c b09c7f", "827a70 77726c 8c8275", 0.2, 0.05)
_add("course", "wall", "8a7e6d 7f766b", "6d665e 656059", 0.2, 0.05)
_add("cap", "wall", "d2c7b3", "a39c91", 0.1, 0.04)
_add("boards", "fence", "a8743f c79a5b 8d5f38 d9d4c8", "7d664d 8d7d68 665546 a19d95", 0.14, 0.06)
_add("lattice", "fence", "5f6a6e e6e2d8 3d5a4a", "6b6f70 a9a7a1 4b5450", 0.06, 0.05)
_add("guardrail", "fence", "c3c8cc", "9a9d9e", 0.08, 0.04)
_add("metal", "pole", "8b9299 6d747b 5f7364", "787b7d 64676a 8b8a86", 0.05, 0.04)
_add("timber", "pole", "7d5f43", "6b5b4c", 0.12, 0.05)
_add("lamp", "pole", "f4ecc8", "c9c6b8", 0, 0, Glow.LAMP)
_add("housing", "traffic light", "23261f 2b2e27", "26282a 303234", 0.02, 0.03)
_add("backplate", "traffic light", "e3a82b 30342b", "8d793f 2f3133", 0.02, 0.03)
_add("red_light", "traffic light", "ff2a1c", "e8402f", 0, 0, Glow.OWN)
_add("amber_light", "traffic light", "ffb81c", "e5ab3d", 0, 0, Glow.OWN)
_add("green_light", "traffic light", "22e07a", "4fd09a", 0, 0, Glow.OWN)
_add("dark_light", "traffic light", "3b3a33", "3a3a38", 0, 0)
_add("sign_red", "traffic sign", "d8232a", "a8383a", 0, 0.03, Glow.FAINT)
_add("sign_blue", "traffic sign", "1d5fc4", "3b5f94", 0, 0.03, Glow.FAINT)
_add("sign_yellow", "traffic sign", "f5c518", "c2a347", 0, 0.03, Glow.FAINT)
_add("sign_green", "traffic sign", "12844a", "3d7358", 0, 0.03, Glow.FAINT)
_add("sign_white", "traffic sign", "f5f5f0", "cfd0cc", 0, 0.02, Glow.FAINT)
_add("sign_black", "traffic sign", "23252a", "2c2e31", 0, 0.02)
_add("leaf", "vegetation", "3f8f34 4a9a3a 367f38 5aa143", "5d7340 687a48 526a42 78804a", 0.42, 0.05)
_add("needle", "vegetation", "2c6b3f 2a5f3a", "455d41 4e6346", 0.42, 0.04)
_add("flower", "vegetation", "d8577a e8c23f", "98655f a18f57", 0.4, 0.05)
_add("bark", "vegetation", "6f4e33 7d5c3f", "5d5045 6b5f53", 0.25, 0.05)
_add("grass", "terrain", "7cc04a 86c554 74b548", "87935a 929763 7b8755", 0.3, 0.04)
_add("soil", "terrain", "b39a5f a8905c", "918467 857a62", 0.3, 0.04)
for _who in ("person", "rider"):
    _add(f"{_who}_skin", _who, "e0ac82 c68a5d 8d5a3a f0c8a0", "b58c70 9a7155 6b4a38 c7a68c", 0)
    _add(f"{_who}_hair", _who, "2f2119 54351f 8a6a3c 1b1a1a", "2b2521 453729 6f5d48 1f1e1e", 0.04)
    _add(
        f"{_who}_top",
        _who,
        "e23c35 2f6fd0 f2c230 2fa36b f0efe9 8a3fa8 ee7a2a 23262d",
        "6f3f40 40506b 8d8768 4d6355 b9b8b3 54475c 86654c 2c2e33",
        0.06,
        0.08,
    )
    _add(f"{_who}_legs", _who, "26365e 2b2d33 6b5a45 4a5a7d", "2f3645 2a2c2f 5a5248 464d58", 0.06)
    _add(f"{_who}_bag", _who, "8a5a2c b3312b 23466b", "5c4a3a 5f3d3b 353f4b", 0.04)
    _add(f"{_who}_shoe", _who, "1d1c1c e8e6e0", "232222 a5a39e", 0)
_add("helmet", "rider", "f2f0ea d8352c 2c5fbf 22252b", "b5b4b0 7d4440 45536b 27292d", 0, 0.06)
for _who in ("car", "truck", "bus", "train"):
    _add(f"{_who}_glass", _who, _GLASS, _GLASS_MUTED, 0.02, 0.03)
    _add(f"{_who}_tire {_who}_trim", _who, _TIRE, "1b1c1d 232425", 0.04, 0.02)
    _add(f"{_who}_rim", _who, "a9aeb3", "85888a", 0, 0.03)
    _add(f"{_who}_head", _who, "f7f4e3", "d6d5cc", 0, 0, Glow.HEADLIGHT)
    _add(f"{_who}_tail", _who, "d3201f", "9d2b2a", 0, 0, Glow.OWN)
    _add(f"{_who}_plate", _who, "f0eee2", "c2c0b6", 0, 0.02)
_add("car_paint", "car", _PAINTS, _PAINTS_MUTED, 0.02, 0.06)
_add(
    "truck_paint",
    "truck",
    "c8322a f4f2ec 2b62b5 e9a622 3d8f52",
    "7a4440 c3c2bd 42546d 918057",
    0.03,
)
_add(
    "truck_cargo", "truck", "e9e6dc d7dadd 9fb4c4 e0c48a", "b5b3ac a3a6a8 878d92 a39a85", 0.07, 0.06
)
_add("bus_paint", "bus", "e9b118 d83a2b 2f7fc9 3aa867", "a08a4b 85504a 53697d 5d7767", 0.03, 0.05)
_add("bus_band", "bus", "f4f1e6 27303a", "bcbab2 33373b", 0.02, 0.03)
_add("bus_glass", "bus", _GLASS, _GLASS_MUTED, 0.02, 0.03, Glow.WINDOW)
_add("train_paint", "train", "e6e3da d9dde0 cfd8c2", "b3b1aa a6a9ab a3a89b", 0.03, 0.04)
_add(
    "train_band", "train", "b8232f 1f7a4f 23519c d98a1f", "74393d 45604f 405069 8d7145", 0.02, 0.05
)
_add("train_glass", "train", _GLASS, _GLASS_MUTED, 0.02, 0.03, Glow.WINDOW)
_add("moto_paint", "motorcycle", "c9261f 1f4fb0 e59a1a 23262b", "6d3533 3a4a63 85703f 2b2d30", 0.03)
_add("moto_dark", "motorcycle", "1b1c20 2b2d33", "202123 2d2e30", 0.05, 0.03)
_add("moto_chrome", "motorcycle", "aeb4ba", "8b8e90", 0.03, 0.03)
_add("moto_head", "motorcycle", "f7f4e3", "d6d5cc", 0, 0, Glow.HEADLIGHT)
_add("moto_tail", "motorcycle", "d3201f", "9d2b2a", 0, 0, Glow.OWN)
_add("bike_frame", "bicycle", "d33a2c 1fa38f e8b51f 2f5fc4", "7d4a44 4b7069 8d7d4d 4a5a75", 0.03)
_add("bike_dark", "bicycle", "202227 2b2d32", "242527 303133", 0.03, 0.03)
_add("bonnet", None, "20242b 2b2f36", "2a2c2e 33302d", 0.03, 0.04)

INDEX = {name: i for i, name in enumerate(_TABLE)}
"""Material name -> row of the tables below."""


def _swatches(colors: tuple[str, ...]) -> list[list[float]]:
    rgb = [[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in colors]
    return [rgb[i % len(rgb)] for i in range(SWATCHES)]


_rows = list(_TABLE.values())
LABEL = np.array([m.label for m in _rows], np.int64)
COLORS = {
    "vivid": np.array([_swatches(m.vivid) for m in _rows], np.float32),
    "muted": np.array([_swatches(m.muted) for m in _rows], np.float32),
}
"""(materials, SWATCHES, 3), RGB in [0, 1]."""
OTHER = {"vivid": "muted", "muted": "vivid"}
SWATCH_COUNT = {
    "vivid": np.array([len(m.vivid) for m in _rows], np.float32),
    "muted": np.array([len(m.muted) for m in _rows], np.float32),
}
TEXTURE = np.array([m.texture for m in _rows], np.float32)
JITTER = np.array([m.jitter for m in _rows], np.float32)
GLOW = np.array([int(m.glow) for m in _rows], np.int64)
GROUND = np.isin(LABEL, [CITYSCAPES.names.index(n) for n in ("road", "sidewalk", "terrain")])
"""Whether a material lies flat."""
