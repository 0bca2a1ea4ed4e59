"""SegFormer's all-MLP decoder, with learned classes or with the class texts.

Xie et al., "SegFormer", NeurIPS 2021 (arXiv 2105.15203), section 3.2, eq. 4. Written from the
equations; the authors' code is under NVIDIA's non-commercial source code license.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from mfuser import DecoderOutput, DecoderSpec, hookimpl
from mfuser_plugins.decoders._per_pixel import (
    ConvClassifier,
    PerPixelDecoder,
    TextClassifier,
    resized,
)


class MLPDecoder(PerPixelDecoder):
    """Each level to one width, up to the finest, side by side, mixed, classified (eq. 4).

    Linear maps of pixels are 1x1 convolutions. As in the authors' code the mixing map is followed
    by batch norm and ReLU, and the classifier preceded by dropout of whole channels.

    classify: (B, D, h, w) and class queries or None -> logits (B, K, h, w).
    """

    def __init__(
        self, channels: tuple[int, ...], width: int, dropout: float, classify: nn.Module
    ) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(level, width, 1) for level in channels)
        self.mix = nn.Sequential(
            nn.Conv2d(len(channels) * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout2d(dropout),
        )
        self.classify = classify

    def forward(self, pyramid: list[Tensor], queries: Tensor | None = None) -> DecoderOutput:
        size = (pyramid[0].shape[-2], pyramid[0].shape[-1])
        levels = [project(level) for project, level in zip(self.project, pyramid, strict=True)]
        mixed = self.mix(torch.cat(resized(levels, size), 1))  # (B, D, h_0, w_0)
        return DecoderOutput([self.classify(mixed, queries)])


class TextMLPDecoder(MLPDecoder):
    """The same for any class texts: nothing in it is learned per class."""

    open_vocabulary: ClassVar[bool] = True


class MLPOptions(DecoderSpec):
    """The options of both (documented where they are named)."""

    tiny: ClassVar[Mapping[str, Any]] = {"width": 16}

    width: PositiveInt = 256
    dropout: float = Field(default=0.1, ge=0, lt=1)


class MLPSpec(MLPOptions, name="mlp"):
    """SegFormer's decoder: linear maps of the four levels, mixed per pixel. Takes no text.

    width: that the levels are mapped to (SegFormer: 256 for B0 and B1, 768 for B2 to B5).
    dropout: of whole channels before the classifier, while training.
    """

    def build(
        self, channels: tuple[int, ...], num_classes: int, text_dim: int | None
    ) -> MLPDecoder:
        classify = ConvClassifier(self.width, num_classes)
        return MLPDecoder(channels, self.width, self.dropout, classify)


class TextMLPSpec(MLPOptions, name="text_mlp"):
    """SegFormer's decoder, each pixel classified by its similarity to the class texts.

    width: that the levels are mapped to, before the projection to the texts' width.
    dropout: of whole channels before that projection, while training.
    temperature: of the softmax over classes.
    """

    needs_text: ClassVar[bool] = True

    temperature: PositiveFloat = 0.07

    def build(
        self, channels: tuple[int, ...], num_classes: int, text_dim: int | None
    ) -> MLPDecoder:
        assert text_dim is not None, "a pairing without text is refused"
        classify = TextClassifier(self.width, text_dim, self.temperature, self.component())
        return TextMLPDecoder(channels, self.width, self.dropout, classify)


@hookimpl
def mfuser_components() -> list[type[DecoderSpec]]:
    return [MLPSpec, TextMLPSpec]
