"""Reading images and labels, with errors that name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mfuser.errors import DataError


class UnreadableImage(DataError):
    """An image or label file that is damaged or of no known format."""


def read_image(path: Path) -> np.ndarray:
    """The image as uint8 (H, W, 3) RGB, pixels as stored (an EXIF orientation is not applied).

    Grey images are repeated over the channels, 16-bit ones keep their high byte, transparency is
    dropped. Raises UnreadableImage naming the file.
    """
    import cv2

    array = _decode(path, cv2.IMREAD_UNCHANGED)
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UnreadableImage(
            f"{path}: pixels of type {array.dtype} are no photograph (8 or 16 bits are)"
        )
    if array.ndim == 2:
        return cv2.cvtColor(array, cv2.COLOR_GRAY2RGB)
    code = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}.get(array.shape[2])
    if code is None:
        raise UnreadableImage(f"{path}: {array.shape[2]} channels are no photograph")
    return cv2.cvtColor(array, code)
