"""How many windows go through a model at once: a number, or as many as the device has use for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mfuser.errors import MFuserError

WindowBatch = int | Literal["auto"]
Origin = tuple[int, int]

SHARE = 0.8
"""Of the free memory that windows may take: allocators lose some to gaps."""
MOST = 64
"""Windows beyond which no device gets faster."""
SMALL = 4 * 96 * 192
"""Pixels at once that keep a CPU busy: with fewer, what each call costs shows (a quarter of the
demo's time), more are no faster. One window of 512x512 is more."""


def integer(value: Any) -> int | None:
    """NumPy's integers count, True and 2.0 do not."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


class Windows:
    """Crops in batches. at_once: a number, or "auto": on a CUDA device the first window is
    measured, and so many follow at once as free memory holds; elsewhere one, or as many small ones
    as are faster together. What was measured holds until memory runs out; then half as many go on.

    Raises MFuserError for anything but a positive integer or "auto".
    """

    def __init__(self, at_once: WindowBatch) -> None:
        self.auto = isinstance(at_once, str) and at_once == "auto"
        found = integer(at_once)
        if not self.auto and (found is None or found < 1):
            raise MFuserError(f"window_batch = {at_once!r}: give a positive integer")
        self._at_once = found or 0
        self._crops: int | None = None
        """One image each; None: not measured yet."""

    def scored(
        self,
        scores: Callable[[Tensor], Tensor],
        images: Tensor,
        window: tuple[int, int],
        origins: Sequence[Origin],
    ) -> Iterator[tuple[Origin, Tensor]]:
        """Each window of images (B, 3, H, W) with its scores (B, K, *window)."""
        start = 0
        if self.auto and self._crops is None and Memory.of(images.device) is None:
            self._crops = max(1, SMALL // (window[0] * window[1]))
        while start < len(origins):
            batch = origins[start : start + self.number(len(images))]
            crops = [images[..., y : y + window[0], x : x + window[1]] for y, x in batch]
            try:
                parts = self._measured(scores, torch.cat(crops))
            except torch.OutOfMemoryError:
                if not self.auto or len(batch) == 1:
                    raise
                self._crops = len(batch) * len(images) // 2
                continue
            start += len(batch)
            yield from zip(batch, parts.unflatten(0, (len(batch), len(images))), strict=True)

    def number(self, images: int = 1) -> int:
        """Windows at once, as far as is known."""
        if not self.auto:
            return self._at_once
        return max(1, (self._crops or 1) // max(1, images))

    def _measured(self, scores: Callable[[Tensor], Tensor], crops: Tensor) -> Tensor:
        if not self.auto or self._crops is not None:
            return scores(crops)
        memory = Memory.of(crops.device)
        assert memory is not None
        with memory:
            found = scores(crops)
        self._crops = fitting(memory.taken / max(1, len(crops)), memory.free())
        return found


def fitting(each: float, free: float) -> int:
    """Crops that fit into `free` bytes where one takes `each`."""
    return int(max(1, min(MOST, SHARE * free // max(1.0, each))))


class Memory:
    """Free memory of a CUDA device, and the peak that the work in a `with` block takes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.taken = 0

    @classmethod
    def of(cls, device: torch.device) -> Memory | None:
        """None where the device's memory cannot be asked for."""
        return cls(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)

    def __exit__(self, *_: object) -> None:
        self.taken = torch.cuda.max_memory_allocated(self.device) - self._before

    def free(self) -> int:
        """Bytes that the system has left, and those that torch keeps for itself unused."""
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + unused
