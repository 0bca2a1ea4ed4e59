"""Losses beside the decoder's own: what they are built from, given, and have to return.

Letters in shapes as in `interfaces`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

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
