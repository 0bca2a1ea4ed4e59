"""Sliding-window segmentation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfuser.errors import MFuserError


def default_stride(window: tuple[int, int]) -> tuple[int, int]:
    """Two thirds of the window: 341 for 512, as released."""
    return (max(1, round(window[0] * 2 / 3)), max(1, round(window[1] * 2 / 3)))


def window_origins(size: int, window: int, stride: int) -> list[int]:
    """Where windows start along one side; the last one ends at the edge.

    >>> window_origins(1024, 512, 341)
    [0, 341, 512]
    """
    count = max(0, -(-(size - window) // stride)) + 1
    return [min(i * stride, size - window) for i in range(count)]


def check_window(size: tuple[int, int], window: tuple[int, int]) -> None:
    """Raises MFuserError for an image of `size` (height, width) smaller than the window."""
    height, width = size
    if height < window[0] or width < window[1]:
        raise MFuserError(
            f"an image of {height}x{width} pixels is smaller than the window of "
            f"{window[0]}x{window[1]} (height x width); enlarge it (predict --scale, a "
            "dataset's test_size), or train with a smaller image_size"
        )


def sliding_window(
    scores: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int] | None = None,
    window_batch: int = 1,
) -> Tensor:
    """Average `scores` (B, K, *window) of overlapping windows of images (B, 3, H, W).

    window_batch: how many windows go through the model at once.
    Raises MFuserError for images smaller than the window.
    """
    height, width = images.shape[-2:]
    check_window((height, width), window)
    if (height, width) == tuple(window):
        return scores(images)
    step = stride or default_stride(window)
    if step[0] > window[0] or step[1] > window[1]:
        raise MFuserError(
            f"a stride of {step[0]}x{step[1]} leaves gaps between windows of "
            f"{window[0]}x{window[1]} (height x width); lower it"
        )
    origins = [
        (y, x)
        for y in window_origins(height, window[0], step[0])
        for x in window_origins(width, window[1], step[1])
    ]
    total: Tensor | None = None
    count = images.new_zeros(1, 1, height, width)
    for start in range(0, len(origins), window_batch):
        batch = origins[start : start + window_batch]
        crops = [images[..., y : y + window[0], x : x + window[1]] for y, x in batch]
        for (y, x), part in zip(batch, scores(torch.cat(crops)).split(len(images)), strict=True):
            if total is None:
                total = part.new_zeros(len(images), part.shape[1], height, width)
            total[..., y : y + window[0], x : x + window[1]] += part
            count[..., y : y + window[0], x : x + window[1]] += 1
    assert total is not None
    return total.div_(count)
