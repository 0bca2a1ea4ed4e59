"""The space of styles and cities, and the boxes in it that the world's domains are drawn from.

A style is a point: one number per parameter of `RANGES`. A box gives every parameter an interval.
Pretraining draws from the boxes of `PRETRAINING`, tuning from those of `DEVELOPMENT`; the five of
`TARGETS` lie outside all of them, in style and in city, and `SOURCE` is what a model trains on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mfuser.errors import MFuserError, suggest
from mfuser_streets.layout import View
from mfuser_streets.street import City
from mfuser_streets.styles import Style

Interval = tuple[float, float]

RANGES: dict[str, Interval] = {
    # paint
    "mute": (0, 1),  # 0: the colors of a video game, 1: those of a camera
    "repaint": (0, 0.6),  # deviation of every material's own color, in logarithms
    "hue": (-3.15, 3.15),  # radians that all colors are turned by
    "saturation": (0, 2),
    "texture": (0, 2),  # contrast of surfaces
    "grain": (0.3, 3),  # fineness of surfaces
    "outline": (0, 1),  # ink along edges
    "levels": (0, 32),  # tones per color that are left; below 2: all
    "brush": (0, 1),  # strokes
    # light
    "sun": (0, 1),  # share of the light
    "overcast": (0, 1),  # 0: a blue sky, 1: a gray one
    "air": (0, 1),  # brightness of gray sky and haze
    "dust": (-0.3, 0.3),  # haze more yellow (above 0) or blue
    "clouds": (0, 1),
    "night": (0, 1),
    "lit": (0, 1),  # share of windows
    # weather
    "fog": (0, 0.2),  # extinction per meter
    "wet": (0, 1),
    "streaks": (0, 1),
    "drops": (0, 1),
    "snow": (0, 1),
    "flakes": (0, 1),
    # sensor and lens
    "exposure": (0.2, 3),
    "contrast": (0.3, 2),
    "gamma": (0.4, 2.5),
    "warmth": (-0.3, 0.3),
    "blur": (0, 10),  # thousandths of the image height
    "noise": (0, 0.2),
    "vignette": (0, 1),
}
"""The range of each parameter of a style."""

NEUTRAL: dict[str, float] = dict.fromkeys(RANGES, 0.0) | {
    "saturation": 1.0, "texture": 1.0, "grain": 1.0, "air": 0.75, "exposure": 1.0,
    "contrast": 1.0, "gamma": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Box:
    """Intervals to draw a style, a camera and a city from. Parameters left out are neutral."""

    view: View
    city: City
    style: Mapping[str, Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, high) in self.style.items():
            check(name, low)
            check(name, high)

    def interval(self, name: str) -> Interval:
        value = NEUTRAL[name]
        low, high = self.style.get(name, (value, value))
        return float(low), float(high)

    def draw(self, rng: np.random.Generator) -> dict[str, float]:
        """A point; as many random numbers whatever the box."""
        chance = rng.random(len(RANGES))
        point = {}
        for share, name in zip(chance, RANGES, strict=True):
            low, high = self.interval(name)
            point[name] = low + float(share) * (high - low)
        return point

    def cities(self) -> dict[str, Interval]:
        """The intervals that say which cities and cameras these are."""
        return {
            "camera height": self.view.height,
            "focal length": self.view.focal,
            "horizon": self.view.horizon,
            "built-up share": self.city.urban,
            "house height": self.city.tall,
        }


def check(name: str, value: float) -> None:
    """Raises MFuserError for a parameter that does not exist or a value outside its range."""
    if name not in RANGES:
        raise MFuserError(f"a style has no parameter '{name}'{suggest(name, RANGES)}")
    low, high = RANGES[name]
    if not low <= value <= high:
        raise MFuserError(f"style.{name} = {value}: it goes from {low:g} to {high:g}")


def style(point: Mapping[str, float]) -> Style:
    """The style at a point of the space.

    Raises MFuserError for a parameter outside its range, named.
    """
    for name, value in point.items():
        check(name, value)
    p = {**NEUTRAL, **point}
    dark = 1 - 0.9 * p["night"]
    gray = np.array([p["air"] * (1 + p["dust"]), p["air"], p["air"] * (1 - p["dust"])])

    def mixed(clear: tuple[float, float, float], cloudy: np.ndarray) -> tuple[float, float, float]:
        r, g, b = np.clip(np.array(clear) + p["overcast"] * (cloudy - clear), 0, 1) * dark
        return float(r), float(g), float(b)

    warmth = p["warmth"]
    return Style(
        "vivid",
        blend=p["mute"],
        repaint=p["repaint"],
        hue=p["hue"],
        saturation=p["saturation"],
        texture=p["texture"],
        grain=p["grain"],
        outline=p["outline"],
        levels=int(p["levels"]) if p["levels"] >= 2 else 0,
        brush=p["brush"],
        sun=p["sun"],
        sky=mixed((0.25, 0.53, 0.9), gray - 0.06),
        skyline=mixed((0.72, 0.87, 0.98), gray + 0.05),
        airlight=mixed((0.78, 0.82, 0.86), gray),
        clouds=p["clouds"],
        night=p["night"],
        lit=p["lit"],
        fog=p["fog"],
        wet=p["wet"],
        streaks=p["streaks"],
        drops=p["drops"],
        snow=p["snow"],
        flakes=p["flakes"],
        exposure=p["exposure"],
        contrast=p["contrast"],
        gamma=p["gamma"],
        balance=(1 + warmth, 1.0, 1 - warmth),
        blur=p["blur"],
        noise=p["noise"],
        vignette=p["vignette"],
    )


def _city(urban: Interval, tall: Interval) -> City:
    """Small things stand nearer, thicker and more often than in real streets: the towers see few
    pixels."""
    return City(urban, tall, reach=60.0, spacing=0.75, near=0.85, stout=1.6, crowd=1.3)


_HOME_VIEW = View((1.35, 1.7), (1.1, 1.3), (0.46, 0.53), (0.42, 0.58), 0.25)
_HOME_CITY = _city((0.2, 0.6), (4.0, 13.0))
_WIDE_VIEW = View((1.2, 1.72), (1.0, 1.38), (0.455, 0.56), (0.36, 0.64), 0.0)
_WIDE_CITY = _city((0.1, 0.6), (4.0, 13.0))
_FAR_VIEW = View((1.78, 2.3), (1.42, 1.75), (0.37, 0.445), (0.4, 0.6), 0.12)
_FAR_CITY = _city((0.64, 0.85), (14.0, 22.0))

SOURCE = Box(
    _HOME_VIEW,
    _HOME_CITY,
    {
        "saturation": (1.1, 1.15), "texture": (0.5, 0.6), "sun": (0.36, 0.5), "clouds": (0.1, 0.6),
        "exposure": (0.97, 1.05), "contrast": (1.04, 1.08), "noise": (0.003, 0.005),
    },
)  # fmt: skip
"""A video game: one paint box, one weather, a clean picture."""

_BROAD: dict[str, Interval] = {
    "mute": (0, 1), "repaint": (0, 0.3), "hue": (-0.3, 0.3), "saturation": (0.35, 1.5),
    "texture": (0.2, 1.3), "grain": (0.6, 1.7), "sun": (0, 0.55), "overcast": (0, 1),
    "air": (0.5, 0.92), "dust": (-0.12, 0.12), "clouds": (0, 1), "exposure": (0.72, 1.25),
    "contrast": (0.78, 1.22), "gamma": (0.72, 1.4), "warmth": (-0.12, 0.12), "fog": (0, 0.005),
    "blur": (0, 1.9), "noise": (0, 0.017), "vignette": (0, 0.19),
}  # fmt: skip


def _family(**changes: Interval) -> Box:
    return Box(_WIDE_VIEW, _WIDE_CITY, {**_BROAD, **changes})


PRETRAINING: dict[str, Box] = {
    "plain": _family(),
    "cartoon": _family(
        outline=(0.3, 1), levels=(4, 12), texture=(0, 0.3), noise=(0, 0), saturation=(0.8, 1.7)
    ),
    "painting": _family(brush=(0.6, 1), repaint=(0.1, 0.4), texture=(0.6, 1.6)),
    "haze": _family(fog=(0.004, 0.012), sun=(0, 0.2), dust=(-0.3, 0.3)),
    "dusk": _family(night=(0.1, 0.45), lit=(0, 0.6), sun=(0, 0.1)),
    "drizzle": _family(wet=(0.05, 0.25), streaks=(0.05, 0.3), overcast=(0.6, 1), sun=(0, 0.1)),
    "frost": _family(snow=(0.08, 0.35), flakes=(0, 0.3), overcast=(0.3, 1), sun=(0, 0.2)),
    "gray": _family(saturation=(0, 0.15), dust=(-0.2, 0.2), gamma=(0.6, 1.7)),
    "odd": _family(hue=(-3.1, 3.1), repaint=(0.2, 0.6), saturation=(0.6, 1.8)),
}
"""Families of unlabeled pictures; each is drawn as often as the others."""

DEVELOPMENT: dict[str, Box] = {
    "dust": _family(fog=(0.012, 0.02), dust=(0.12, 0.3), overcast=(0.7, 1), sun=(0, 0)),
    "twilight": _family(night=(0.5, 0.7), lit=(0.1, 0.6), sun=(0, 0)),
    "showers": _family(wet=(0.3, 0.45), streaks=(0.3, 0.45), drops=(0, 0.15), sun=(0, 0)),
    "slush": _family(snow=(0.38, 0.5), flakes=(0.2, 0.38), overcast=(0.6, 1), sun=(0, 0)),
    "film": _family(saturation=(0, 0.1), contrast=(1.2, 1.4), gamma=(0.6, 0.75)),
}
"""Choices are made on these, so that none is made on a target."""

_CAMERA: dict[str, Interval] = {
    "mute": (1, 1), "saturation": (0.8, 1.1), "exposure": (0.95, 1.25), "contrast": (0.9, 1.15),
    "warmth": (-0.06, 0.08), "sun": (0.15, 0.55), "overcast": (0.5, 0.9), "air": (0.74, 0.82),
    "clouds": (0.4, 1), "texture": (0.9, 1.4), "fog": (0.001, 0.004), "blur": (2.1, 3.2),
    "noise": (0.019, 0.032), "vignette": (0.2, 0.4),
}  # fmt: skip
_DULL: dict[str, Interval] = {**_CAMERA, "sun": (0, 0), "overcast": (1, 1)}


def _target(**changes: Interval) -> Box:
    return Box(_FAR_VIEW, _FAR_CITY, {**(_DULL if changes else _CAMERA), **changes})


TARGETS: dict[str, Box] = {
    "camera": _target(),
    "fog": _target(
        fog=(0.024, 0.055), air=(0.68, 0.8), clouds=(0, 0), contrast=(0.95, 0.95),
        saturation=(0.6, 0.9),
    ),
    "night": _target(
        night=(0.84, 0.96), lit=(0.2, 0.5), clouds=(0.15, 0.15), noise=(0.035, 0.055),
        fog=(0.002, 0.006), contrast=(1.05, 1.05),
    ),
    "rain": _target(
        wet=(0.5, 0.85), streaks=(0.5, 1), drops=(0.2, 1), fog=(0.006, 0.014), air=(0.55, 0.68),
        clouds=(0.7, 0.7), exposure=(0.75, 0.95), saturation=(0.65, 0.9),
    ),
    "snow": _target(
        snow=(0.55, 1), flakes=(0.4, 1), fog=(0.006, 0.016), air=(0.76, 0.86), clouds=(0.5, 0.5),
        saturation=(0.6, 0.85), exposure=(0.92, 1.1),
    ),
}  # fmt: skip
"""Five domains that nothing is ever trained, pretrained or tuned on."""
