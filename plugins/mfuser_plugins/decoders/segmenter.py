"""Segmenter's mask transformer, with learned class embeddings or with the class texts.

Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021 (arXiv 2105.05633),
section 3.2. Written from the paper; the authors' code is under the MIT license.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import DecoderOutput, DecoderSpec, hookimpl
from mfuser_plugins.decoders._per_pixel import PerPixelDecoder, given, resized

LEVEL = 2
"""The pyramid's level at the stride of the encoders' patches (16)."""


class Segmenter(PerPixelDecoder):
    """Class embeddings and patches through transformer layers; masks are their cosines.

    Segmenter reads the tokens of the last block. Here the four levels are mapped to one width and
    added at stride 16, so that all taps are read.

    text_dim: width of the class queries that the class embeddings are projected from; None: learned
        embeddings, one per class.
    """

    def __init__(
        self,
        spec: SegmenterOptions,
        channels: tuple[int, ...],
        num_classes: int,
        text_dim: int | None,
    ) -> None:
        super().__init__()
        width = spec.width
        self.name, self.num_classes = spec.component(), num_classes
        self.project = nn.ModuleList(nn.Conv2d(level, width, 1) for level in channels)
        self.from_text = nn.Linear(text_dim, width) if text_dim is not None else None
        self.embeddings = (
            nn.Parameter(nn.init.trunc_normal_(torch.empty(num_classes, width), std=0.02))
            if text_dim is None
            else None
        )
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                spec.heads,
                4 * width,
                spec.dropout,
                F.gelu,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(spec.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Linear(width, width, bias=False)
        self.classes = nn.Linear(width, width, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)

    def forward(self, pyramid: list[Tensor], queries: Tensor | None = None) -> DecoderOutput:
        size = (pyramid[LEVEL].shape[-2], pyramid[LEVEL].shape[-1])
        levels = [project(level) for project, level in zip(self.project, pyramid, strict=True)]
        patches = torch.stack(resized(levels, size)).sum(0).flatten(2).transpose(1, 2)  # (B, N, D)
        if self.from_text is not None:
            classes = self.from_text(given(queries, self.name))  # (B, K, D)
        else:
            assert self.embeddings is not None
            classes = self.embeddings.expand(patches.shape[0], -1, -1)
        x = torch.cat([patches, classes], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        patches, classes = x.split([patches.shape[1], self.num_classes], 1)
        masks = F.normalize(self.patches(patches), dim=-1) @ F.normalize(
            self.classes(classes), dim=-1
        ).transpose(1, 2)  # (B, N, K)
        return DecoderOutput([self.mask_norm(masks).transpose(1, 2).unflatten(2, size)])


class SegmenterOptions(DecoderSpec):
    """The options of both (documented where they are named)."""

    tiny: ClassVar[Mapping[str, Any]] = {"width": 16, "heads": 2, "layers": 1}

    width: PositiveInt = 768
    heads: PositiveInt = 12
    layers: PositiveInt = 2
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _divides(self) -> SegmenterOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class SegmenterSpec(SegmenterOptions, name="segmenter"):
    """Segmenter's mask transformer with a learned embedding per class. Takes no text.

    width, heads, layers: of the transformer; heads divide the width.
    dropout: in its layers, while training.
    """

    def build(self, channels: tuple[int, ...], num_classes: int, text_dim: int | None) -> Segmenter:
        return Segmenter(self, channels, num_classes, None)


class TextSegmenterSpec(SegmenterOptions, name="text_segmenter"):
    """Segmenter's mask transformer whose class embeddings are projected class texts.

    width, heads, layers: of the transformer; heads divide the width.
    dropout: in its layers, while training.
    """

    needs_text: ClassVar[bool] = True

    def build(self, channels: tuple[int, ...], num_classes: int, text_dim: int | None) -> Segmenter:
        assert text_dim is not None, "a pairing without text is refused"
        return Segmenter(self, channels, num_classes, text_dim)


@hookimpl
def mfuser_components() -> list[type[DecoderSpec]]:
    return [SegmenterSpec, TextSegmenterSpec]
