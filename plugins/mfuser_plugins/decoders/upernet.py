"""UPerNet's decoder, with learned classes or with the class texts.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018 (arXiv 1807.10221),
section 3.1; the pooling module is PSPNet's (Zhao et al., CVPR 2017, arXiv 1612.01105, section 3.2).
Written from the papers; the authors' code is under the BSD 3-clause license.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import DecoderOutput, DecoderSpec, hookimpl
from mfuser_plugins.decoders._per_pixel import (
    ConvClassifier,
    PerPixelDecoder,
    TextClassifier,
    resized,
)


class ConvBlock(nn.Sequential):
    """Convolution, group norm, ReLU.

    Group norm where the papers have batch norm: the pooled maps of the coarsest level are as small
    as 1x1, and a batch of one or two crops has no statistics there.
    """

    def __init__(self, channels: int, width: int, kernel: int, groups: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
        )


class PyramidPooling(nn.Module):
    """The coarsest level beside its means over 1x1, 2x2, 3x3 and 6x6 parts, mixed."""

    def __init__(self, channels: int, width: int, bins: tuple[int, ...], groups: int) -> None:
        super().__init__()
        self.bins = bins
        self.reduce = nn.ModuleList(ConvBlock(channels, width, 1, groups) for _ in bins)
        self.mix = ConvBlock(channels + len(bins) * width, width, 3, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, D, h, w)."""
        size = (x.shape[-2], x.shape[-1])
        pooled = [
            reduce(F.adaptive_avg_pool2d(x, side))
            for side, reduce in zip(self.bins, self.reduce, strict=True)
        ]
        return self.mix(torch.cat([x, *resized(pooled, size)], 1))


class UPerNet(PerPixelDecoder):
    """Pyramid pooling, a feature pyramid from coarse to fine, all levels mixed at the finest.

    classify: (B, D, h, w) and class queries or None -> logits (B, K, h, w).
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        width: int,
        bins: tuple[int, ...],
        groups: int,
        dropout: float,
        classify: nn.Module,
    ) -> None:
        super().__init__()
        *finer, coarsest = channels
        self.pool = PyramidPooling(coarsest, width, bins, groups)
        self.lateral = nn.ModuleList(ConvBlock(level, width, 1, groups) for level in finer)
        self.smooth = nn.ModuleList(ConvBlock(width, width, 3, groups) for _ in finer)
        self.mix = ConvBlock(len(channels) * width, width, 3, groups)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = classify

    def forward(self, pyramid: list[Tensor], queries: Tensor | None = None) -> DecoderOutput:
        *finer, coarsest = pyramid
        summed = [self.pool(coarsest)]  # coarsest first
        for lateral, level in zip(reversed(self.lateral), reversed(finer), strict=True):
            (above,) = resized(summed[-1:], (level.shape[-2], level.shape[-1]))
            summed.append(lateral(level) + above)
        coarse, *rest = summed
        smoothed = [coarse, *(s(x) for s, x in zip(reversed(self.smooth), rest, strict=True))]
        size = (pyramid[0].shape[-2], pyramid[0].shape[-1])
        mixed = self.mix(torch.cat(resized(smoothed, size), 1))  # (B, D, h_0, w_0)
        return DecoderOutput([self.classify(self.dropout(mixed), queries)])


class TextUPerNet(UPerNet):
    """The same for any class texts: nothing in it is learned per class."""

    open_vocabulary: ClassVar[bool] = True


class UPerNetOptions(DecoderSpec):
    """The options of both (documented where they are named)."""

    tiny: ClassVar[Mapping[str, Any]] = {"width": 16, "norm_groups": 4}

    width: PositiveInt = 512
    bins: tuple[PositiveInt, ...] = Field(default=(1, 2, 3, 6), min_length=1)
    norm_groups: PositiveInt = 32
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _divides(self) -> UPerNetOptions:
        if self.width % self.norm_groups:
            raise ValueError(
                f"width {self.width} is not a multiple of norm_groups {self.norm_groups}"
            )
        return self

    def decoder(
        self, made: type[UPerNet], channels: tuple[int, ...], classify: nn.Module
    ) -> UPerNet:
        return made(channels, self.width, self.bins, self.norm_groups, self.dropout, classify)


class UPerNetSpec(UPerNetOptions, name="upernet"):
    """UPerNet: pyramid pooling and a feature pyramid network. Takes no text.

    width: of every level. norm_groups: of the group norms; they divide the width.
    bins: sides of the grids over which the coarsest level is averaged.
    dropout: of whole channels before the classifier, while training.
    """

    def build(self, channels: tuple[int, ...], num_classes: int, text_dim: int | None) -> UPerNet:
        return self.decoder(UPerNet, channels, ConvClassifier(self.width, num_classes))


class TextUPerNetSpec(UPerNetOptions, name="text_upernet"):
    """UPerNet, each pixel classified by its similarity to the class texts.

    width: of every level. norm_groups: of the group norms; they divide the width.
    bins: sides of the grids over which the coarsest level is averaged.
    dropout: of whole channels before the projection to the texts' width, while training.
    temperature: of the softmax over classes.
    """

    needs_text: ClassVar[bool] = True

    temperature: PositiveFloat = 0.07

    def build(self, channels: tuple[int, ...], num_classes: int, text_dim: int | None) -> UPerNet:
        assert text_dim is not None, "a pairing without text is refused"
        classify = TextClassifier(self.width, text_dim, self.temperature, self.component())
        return self.decoder(TextUPerNet, channels, classify)


@hookimpl
def mfuser_components() -> list[type[DecoderSpec]]:
    return [UPerNetSpec, TextUPerNetSpec]
