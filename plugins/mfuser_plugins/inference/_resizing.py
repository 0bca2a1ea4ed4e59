"""Images and class scores at other sizes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mfuser.model.sliding_window import at_least_float32

Size = tuple[int, int]


def size_of(images: Tensor) -> Size:
    return int(images.shape[-2]), int(images.shape[-1])


def scaled(size: Size, factor: float) -> Size:
    """At least one pixel each way."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def resize(maps: Tensor, size: Size, antialias: bool = False) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear; untouched where it has that size already.

    antialias: for pictures, where they get smaller. Half precision becomes float32.
    """
    old = size_of(maps)
    if old == size or not len(maps):
        return maps if old == size else maps.new_empty(*maps.shape[:2], *size)
    return F.interpolate(
        at_least_float32(maps),
        size,
        mode="bilinear",
        align_corners=False,
        antialias=antialias and (size[0] < old[0] or size[1] < old[1]),
    )
