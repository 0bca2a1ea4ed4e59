"""Sliding-window segmentation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfuser.errors import MFuserError
from mfuser.inference import Inference, Network
from mfuser.model.window_batch import WindowBatch, Windows, integer


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


def checked_stride(
    stride: int | tuple[int, int] | None, window: tuple[int, int]
) -> tuple[int, int]:
    """(height, width) of a stride given as one number, a pair, or None for the default.

    Raises MFuserError for anything but one or two integers from 1 to the window's size.
    """
    if stride is None:
        return default_stride(window)
    pair = tuple(stride) if isinstance(stride, (tuple, list)) else (stride, stride)
    steps = [integer(step) for step in pair]
    if len(steps) != 2 or any(step is None or step < 1 for step in steps):
        raise MFuserError(
            f"stride = {stride!r}: give one positive integer or (height, width), in pixels"
        )
    height, width = (int(step) for step in steps if step is not None)
    if height > window[0] or width > window[1]:
        raise MFuserError(
            f"a stride of {height}x{width} leaves gaps between windows of "
            f"{window[0]}x{window[1]} (height x width); lower it"
        )
    return height, width


def sliding_window(
    scores: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    window_batch: WindowBatch | Windows = 1,
) -> Tensor:
    """Average `scores` (B, K, *window) of overlapping windows of images (B, 3, H, W).

    Sums are float32 where scores are of half precision. window_batch: how many windows go through
    the model at once, as `Windows` takes it.

    Raises MFuserError for images smaller than the window, and as `checked_stride` does.
    """
    height, width = images.shape[-2:]
    check_window((height, width), window)
    step = checked_stride(stride, window)
    windows = window_batch if isinstance(window_batch, Windows) else Windows(window_batch)
    if (height, width) == tuple(window):
        return at_least_float32(scores(images))
    origins = [
        (y, x)
        for y in window_origins(height, window[0], step[0])
        for x in window_origins(width, window[1], step[1])
    ]
    total: Tensor | None = None
    count = images.new_zeros(1, 1, height, width, dtype=torch.float32)
    for (y, x), found in windows.scored(scores, images, window, origins):
        part = at_least_float32(found)
        if total is None:
            total = part.new_zeros(len(images), part.shape[1], height, width)
        total[..., y : y + window[0], x : x + window[1]] += part
        count[..., y : y + window[0], x : x + window[1]] += 1
    assert total is not None
    return total.div_(count)


def blended(
    maps: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: int | tuple[int, int] | None = None,
) -> Tensor:
    """`sliding_window` for pictures: windows fade into each other, so that no seams show.

    The weight of a window falls linearly from its middle to its edges, where a thousandth is left.
    """
    if tuple(images.shape[-2:]) == tuple(window):
        return sliding_window(maps, images, window, stride)
    ramps = [
        1.001 - torch.linspace(-1, 1, size, device=images.device, dtype=torch.float32).abs()
        for size in window
    ]
    weight = ramps[0][:, None] * ramps[1]  # (h, w)

    def weighted(windows: Tensor) -> Tensor:
        found = at_least_float32(maps(windows))
        return torch.cat([found * weight, weight.expand(len(found), 1, -1, -1)], 1)

    both = sliding_window(weighted, images, window, stride)
    return both[:, :-1] / both[:, -1:]


def at_least_float32(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores


class Sliding(Inference):
    """The sliding window as an inference. stride, window_batch: as `sliding_window` takes them."""

    def __init__(
        self, stride: int | tuple[int, int] | None = None, window_batch: WindowBatch = 1
    ) -> None:
        self.stride, self.windows = stride, Windows(window_batch)

    @property
    def window_batch(self) -> int:
        """Windows at once, as far as is known."""
        return self.windows.number()

    def __call__(self, network: Network, images: Tensor) -> Tensor:
        return sliding_window(network.scores, images, network.window, self.stride, self.windows)

    def check(self, network: Network, size: tuple[int, int]) -> None:
        check_window(size, network.window)
        checked_stride(self.stride, network.window)
