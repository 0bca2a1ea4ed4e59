"""Photographs that stay in their files until a crop says which part of them it shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from mfuser.data import png
from mfuser.data.images import BROKEN, read_image, unreadable

REDUCTIONS = (8, 4, 2)
"""A JPEG file can be decoded at these parts of its size, from fewer coefficients of each block."""

Shape = tuple[int, int, int]


class Picture(Protocol):
    """An image (H, W, 3) in its file. Windows of it are what `read_image` gives, cut out."""

    shape: Shape

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        """uint8 (h, w, 3) RGB, the caller's own. Both slices have a start and a stop, within the
        image. Raises UnreadableImage."""

    def reduced(self, scaled: tuple[int, int]) -> tuple[np.ndarray, tuple[float, float]] | None:
        """The whole image at a part of its size that is still at least `scaled` (height, width),
        with the size, in its pixels, of the area that it shows; None where its file holds none."""


class _Png:
    def __init__(self, path: Path, stored: png.Stored) -> None:
        self.path, self.stored = path, stored
        self.shape: Shape = (stored.height, stored.width, 3)

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        found = self.stored.rgb(*window)
        return read_image(self.path)[window].copy() if found is None else found

    def reduced(self, scaled: tuple[int, int]) -> None:
        return None


class _Jpeg:
    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.shape = path, shape

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        return read_image(self.path)[window].copy()

    def reduced(self, scaled: tuple[int, int]) -> tuple[np.ndarray, tuple[float, float]] | None:
        height, width, _ = self.shape
        most = min(height / scaled[0], width / scaled[1])
        part = next((part for part in REDUCTIONS if part <= most), None)
        if part is None:
            return None
        try:
            with Image.open(self.path) as image:
                image.draft("RGB", (width // part, height // part))
                pixels = np.array(image)
        except BROKEN as error:
            raise unreadable(self.path, error) from error
        if pixels.shape != (math.ceil(height / part), math.ceil(width / part), 3):
            return None  # a version of Pillow or of libjpeg that reduces otherwise
        return pixels, (height / part, width / part)


def open_picture(path: Path) -> Picture | None:
    """The image in `path`, its header read; None for files that are only read as a whole."""
    try:
        with path.open("rb") as file:
            start = file.read(len(png.SIGNATURE))
            if start == png.SIGNATURE:
                file.seek(0)
                stored = png.opened(file.read())
                known = stored is not None and stored.color != png.PALETTE
                return _Png(path, stored) if stored is not None and known else None
            if not start.startswith(b"\xff\xd8"):
                return None
        with Image.open(path) as image:
            if image.format != "JPEG" or image.mode != "RGB":
                return None
            return _Jpeg(path, (image.height, image.width, 3))
    except BROKEN:
        return None
