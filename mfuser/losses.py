"""Losses beside the decoder's own: what they are built from, given, and have to return.

Letters in shapes as in `interfaces`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from mfuser.interfaces import DecoderOutput


@dataclass(frozen=True)
class LossParts:
    """The model that a loss is built for.

    channels: of the pyramid's levels, finest first; () where the decoder reads none. text_dim: C;
    None without a vision-language model. encode: texts, and how many slots each may take (None: as
    many as the pairing's prompt) -> embeddings (n, C) by the text tower as it is before training.
    """

    classes: tuple[str, ...]
    channels: tuple[int, ...]
    text_dim: int | None
    encode: Callable[[list[str], int | None], Tensor]


@dataclass
class LossInputs:
    """The inputs of a loss; None for those that its spec does not declare in `needs`, or that do
    not exist.

    images: (B, 3, H, W), RGB in [0, 1]. labels: (B, H, W) int64, 255 ignored.
    output: the decoder's. pyramid: features at strides 4, 8, 16, 32; [] where it reads none.
    log_probs: log-probabilities of the classes (B, K, H, W), whatever the decoder's scores are.
    queries: class queries (B, K, C). visual: embeddings of image and patches (B, 1 + T, C).
    alignment: cosine similarities of patches and queries (B, K, h, w).
    frozen: `visual` of the vision-language model alone as it was before training, no gradient.
    view: the same of `Loss.view(images)`, without another view.
    """

    images: Tensor
    labels: Tensor
    output: DecoderOutput
    pyramid: list[Tensor] = field(default_factory=list)
    log_probs: Tensor | None = None
    queries: Tensor | None = None
    visual: Tensor | None = None
    alignment: Tensor | None = None
    frozen: Tensor | None = None
    view: LossInputs | None = None


class Loss(nn.Module, ABC):
    """A loss beside the decoder's own."""

    @abstractmethod
    def forward(self, given: LossInputs) -> dict[str, Tensor]:
        """-> named scalars, finite for any labels; logged as COMPONENT.NAME, times the weight."""

    def view(self, images: Tensor) -> Tensor:
        """RGB in [0, 1] (B, 3, H, W) -> another view of the same crops, pixel on pixel; by torch's
        generator. For specs that need a "view"."""
        raise NotImplementedError


class Exchange(Protocol):
    """Collective operations on a tensor of each process of a step."""

    count: int

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes, of the same shape."""

    def concatenated(self, values: Tensor) -> Tensor:
        """The values (n,) of all processes, one after the other; n may differ."""


class WholeBatch:
    """The batch of a training step over all its processes, for losses that divide by a count.

    Gradients are averaged over the processes. A loss that is a mean over things that it counts
    itself (masks, labeled pixels) is multiplied by `share(count)`: the gradient is then that of one
    process which holds the whole batch. In one process, all of this changes nothing, to the bit.

    Every process of a step makes the same calls in the same order, whatever its crops show: call
    before returning early.
    """

    def __init__(self) -> None:
        self._processes: Exchange | None = None

    @contextlib.contextmanager
    def over(self, processes: Exchange) -> Iterator[None]:
        """Within, the batch of these processes; else, and if it is one, of this process alone."""
        self._processes = processes if processes.count > 1 else None
        try:
            yield
        finally:
            self._processes = None

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes of a tensor without gradient."""
        return value if self._processes is None else self._processes.total(value)

    def concatenated(self, values: Tensor) -> Tensor:
        """The values (n,) of all processes, without gradient; n may differ."""
        return values if self._processes is None else self._processes.concatenated(values)

    def share(self, count: Tensor) -> Tensor | float:
        """This process's counts over their means in all processes; 0 where nothing was counted."""
        if self._processes is None:
            return 1.0
        own = count.detach().to(torch.promote_types(count.dtype, torch.float32))
        total = self._processes.total(own).clamp_min(torch.finfo(own.dtype).tiny)
        return own * self._processes.count / total


whole_batch = WholeBatch()
"""Of the step that runs now; the engine says which processes take part."""
