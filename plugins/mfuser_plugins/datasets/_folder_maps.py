"""Decoding of common mask formats into class ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from mfuser import IGNORE, DataError
from mfuser.errors import suggest
from mfuser_plugins.datasets._files import LabelMap


class ColorMap(LabelMap):
    """RGB -> class; palette images are read by the palette that they carry."""

    def mapped(self, raw: np.ndarray, path: Path) -> np.ndarray:
        if raw.ndim == 2:
            with Image.open(path) as image:
                if image.mode == "P":
                    raw = np.asarray(image.convert("RGB"))
                elif image.mode == "L":
                    raw = np.repeat(raw[..., None], 3, axis=2)
        return super().mapped(raw, path)


class BinaryMap(LabelMap):
    """0 is one class, every other value the other."""

    def mapped(self, raw: np.ndarray, path: Path) -> np.ndarray:
        if raw.ndim == 3 and (raw[..., :3] == raw[..., :1]).all():
            raw = raw[..., 0]  # gray, saved in three channels
        return super().mapped((raw > 0).astype(np.uint8) if raw.ndim == 2 else raw, path)


class PanopticMap(LabelMap):
    """COCO: the color of a pixel is the id of its segment, whose category a JSON file gives.

    R + 256 G + 65536 B is the id; black is ignored.

    segments: mask file name -> segment id -> class.
    """

    def __init__(self, segments: Mapping[str, Mapping[int, int]]) -> None:
        super().__init__({})
        self.segments = segments

    def key(self) -> bytes:
        return sha256(repr(sorted(self.segments.items())).encode()).digest()

    def mapped(self, raw: np.ndarray, path: Path) -> np.ndarray:
        segments = self.segments.get(path.name)
        if segments is None:
            raise DataError(f"{path} is not among the annotations of its panoptic JSON file")
        colors = {(i & 255, i >> 8 & 255, i >> 16): c for i, c in segments.items()}
        return LabelMap({}, colors={**colors, (0, 0, 0): IGNORE}).mapped(raw, path)


def panoptic_map(path: Path, names: tuple[str, ...]) -> LabelMap:
    """The map that COCO's panoptic JSON gives. Raises DataError."""
    try:
        document = json.loads(path.read_text("utf-8"))
        categories = {c["id"]: c["name"] for c in document["categories"]}
        annotations = document["annotations"]
        index = {i: names.index(n) if n in names else IGNORE for i, n in categories.items()}
        unknown = [n for n in names if n not in categories.values()]
        if unknown:
            raise DataError(
                f"folder: {path} has no category '{unknown[0]}'"
                f"{suggest(unknown[0], categories.values())}"
            )
        return PanopticMap(
            {
                a["file_name"]: {s["id"]: index[s["category_id"]] for s in a["segments_info"]}
                for a in annotations
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"folder: {path} is not readable as a COCO panoptic file: {type(error).__name__}: "
            f"{error}"
        ) from error
