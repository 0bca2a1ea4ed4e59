"""Photographs on their way into a model: upright, and in the size that they are read in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mfuser.data.images import UnreadableImage, read_image
from mfuser.errors import MFuserError, placed

Scale = float | Literal["auto", "fit"]
"""A factor; "auto": enlarge what is smaller than the window; "fit": resize until it just covers the
window."""


def check_scale(scale: Scale) -> None:
    if not isinstance(scale, str) and (not scale > 0 or not math.isfinite(scale)):
        raise MFuserError(f"scale is a factor above 0, not {scale}")


def read(path: Path) -> np.ndarray:
    """uint8 (H, W, 3), as viewers show it. Raises UnreadableImage."""
    return read_image(path, upright=True)


def scaled(size: Sequence[int], scale: Scale, window: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that an image of `size` is read in."""
    height, width = size
    if isinstance(scale, str):
        # Rounded up, so that the window fits.
        factor = max(1.0 if scale == "auto" else 0.0, window[0] / height, window[1] / width)
        return math.ceil(height * factor - 1e-9), math.ceil(width * factor - 1e-9)
    return max(1, round(height * scale)), max(1, round(width * scale))


def pixels(
    image: np.ndarray, scale: Scale, window: tuple[int, int], device: torch.device
) -> Tensor:
    """(H, W, 3) -> (1, 3, h, w), uint8, or float in [0, 1] where it was resized."""
    height, width = image.shape[:2]
    size = scaled((height, width), scale, window)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
    if size == (height, width):
        return tensor
    return torch.nn.functional.interpolate(
        tensor.float() / 255, size, mode="bilinear", align_corners=False, antialias=size[0] < height
    )


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Errors name the image, once."""
    try:
        yield
    except UnreadableImage:
        raise
    except MFuserError as error:
        raise placed(error, str(path)) from error
