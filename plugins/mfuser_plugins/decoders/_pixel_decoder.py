"""The pixel decoder: deformable attention over three levels, with text, then one FPN step."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfuser import DecoderSpec
from mfuser_plugins.decoders._msdeform import DeformableAttention, Shapes
from mfuser_plugins.decoders._transformer import (
    Attention,
    FeedForward,
    pixel_centers,
    sine_positions,
)

Init = Literal["released", "pytorch"]


class PixelSpec(DecoderSpec):
    """The options of the pixel decoder (documented where they are named)."""

    width: PositiveInt = 256
    heads: PositiveInt = 8
    points: PositiveInt = 4
    pixel_layers: PositiveInt = 6
    pixel_ffn: PositiveInt = 2048
    norm_groups: PositiveInt = 32
    init: Init = "pytorch"


LEVELS = 3
"""The coarser three of the four pyramid levels (strides 32, 16, 8) go through attention."""


class ConvNorm(nn.Module):
    """Convolution and group norm."""

    def __init__(
        self, channels: int, width: int, kernel: int, groups: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=bias)
        self.gn = nn.GroupNorm(groups, width)

    def reset(self) -> None:
        """Kaiming-normal weights (fan out, ReLU's gain) and zero bias.

        This is how mmcv's ConvModule, which the released models use, initializes a convolution.
        The norm after it hides the scale in the forward pass, but not in training: the size of
        AdamW's steps does not depend on the weights. With 2048 input and 256 output channels the
        standard deviation is 0.088; with PyTorch's own initialization it is 0.013.
        """
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(self.conv(x))


class PixelLayer(nn.Module):
    """Deformable self-attention of pixels, attention to the class texts, feed-forward.

    The attention to the texts is tqdm's addition to Mask2Former (ECCV 2024); without text it is
    left out.
    """

    def __init__(self, spec: PixelSpec, text: bool) -> None:
        super().__init__()
        width, heads = spec.width, spec.heads
        self.attentions = nn.ModuleList([DeformableAttention(width, heads, LEVELS, spec.points)])
        if text:
            self.attentions.append(Attention(width, heads))
        self.ffns = nn.ModuleList([FeedForward(width, spec.pixel_ffn)])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if text else 2))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        reference: Tensor,
        shapes: Shapes,
        text: Tensor | None = None,
        text_positions: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D), positions (N, D), reference (N, 2), text (B, K, D) -> (B, N, D)."""
        x = self.norms[0](x + self.attentions[0](x + positions, x, reference, shapes))
        if text is not None:
            x = self.norms[1](x + self.attentions[1](x, positions, text, text_positions))
        return self.norms[-1](x + self.ffns[0](x))


class PixelEncoder(nn.Module):
    """The layers, and a norm after the last."""

    checkpointing = False

    def __init__(self, spec: PixelSpec, text: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PixelLayer(spec, text) for _ in range(spec.pixel_layers))
        self.post_norm = nn.LayerNorm(spec.width)

    def forward(self, x: Tensor, *context: Tensor | Shapes) -> Tensor:
        again = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, *context, use_reentrant=False) if again else layer(x, *context)
        return self.post_norm(x)


class PixelDecoder(nn.Module):
    """Pyramid and class texts -> the mask feature and three levels for the query decoder.

    Mask2Former's pixel decoder (arXiv 2112.01527, section 3.2.1) with text in every layer, or
    (`text_dim` None) without any.
    Levels may have any sizes; none is derived from another.

    spec.init: how the convolutions before a norm start, "released" (`ConvNorm.reset`) or as PyTorch
        makes them. Everything else starts alike: linear maps and the mask feature's convolution as
        PyTorch makes them, embeddings standard normal, deformable attention as published.
    """

    def __init__(
        self,
        spec: PixelSpec,
        channels: tuple[int, ...],
        num_classes: int,
        text_dim: int | None,
    ) -> None:
        super().__init__()
        width, norm_groups = spec.width, spec.norm_groups
        finest, *coarser = channels
        self.input_convs = nn.ModuleList(
            ConvNorm(level, width, 1, norm_groups, bias=True) for level in reversed(coarser)
        )
        self.level_encoding = nn.Embedding(LEVELS, width)
        reads = text_dim is not None
        self.text_proj = nn.Linear(text_dim, width) if text_dim is not None else None
        self.text_pos_embed = nn.Embedding(num_classes, width) if reads else None
        self.encoder = PixelEncoder(spec, reads)
        self.lateral_convs = nn.ModuleList([ConvNorm(finest, width, 1, norm_groups)])
        self.output_convs = nn.ModuleList([ConvNorm(width, width, 3, norm_groups)])
        self.mask_feature = nn.Conv2d(width, width, 1)
        if spec.init == "released":
            for module in self.modules():
                if isinstance(module, ConvNorm):
                    module.reset()

    def forward(
        self, pyramid: list[Tensor], text: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Levels (B, C_i, h_i, w_i), finest first, text (B, K, C).

        -> mask feature (B, D, h_0, w_0); levels (B, D, h_i, w_i), coarsest first.
        """
        finest, *coarser = pyramid
        levels = [
            conv(level) for conv, level in zip(self.input_convs, reversed(coarser), strict=True)
        ]
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        tokens = torch.cat([level.flatten(2) for level in levels], -1).transpose(1, 2)
        positions = torch.cat(
            [
                sine_positions(shape, tokens.shape[-1], tokens) + encoding
                for shape, encoding in zip(shapes, self.level_encoding.weight, strict=True)
            ]
        )
        reference = torch.cat([pixel_centers(shape, tokens) for shape in shapes])
        read: list[Tensor] = []
        if self.text_proj is not None and self.text_pos_embed is not None:
            assert text is not None, "built to read text"
            read = [self.text_proj(text), self.text_pos_embed.weight]
        tokens = self.encoder(tokens, positions, reference, shapes, *read)
        sizes = [h * w for h, w in shapes]
        levels = [
            part.transpose(1, 2).unflatten(-1, shape)
            for part, shape in zip(tokens.split(sizes, 1), shapes, strict=True)
        ]
        lateral = self.lateral_convs[0](finest)
        upsampled = F.interpolate(
            levels[-1], lateral.shape[-2:], mode="bilinear", align_corners=False
        )
        fine = F.relu(self.output_convs[0](lateral + upsampled))
        return self.mask_feature(fine), levels
