"""Mask2Former's decoder (arXiv 2112.01527), for learned queries and for text queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import Decoder, DecoderOutput, MFuserError
from mfuser.model.sliding_window import at_least_float32
from mfuser_plugins.decoders._mask_losses import MaskLossSpec
from mfuser_plugins.decoders._pixel_decoder import LEVELS, PixelDecoder, PixelSpec
from mfuser_plugins.decoders._transformer import Attention, FeedForward, sine_positions


class QueryLayer(nn.Module):
    """Masked attention to pixels, self-attention of queries, feed-forward."""

    def __init__(self, spec: MaskDecoderSpec) -> None:
        super().__init__()
        width, heads = spec.width, spec.heads
        self.attentions = nn.ModuleList([Attention(width, heads), Attention(width, heads)])
        self.ffns = nn.ModuleList([FeedForward(width, spec.ffn)])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, x: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor, hidden: Tensor
    ) -> Tensor:
        """x (B, Q, D), memory (B, N, D), hidden (B, Q, N) -> (B, Q, D)."""
        read, talk = self.attentions
        x = self.norms[0](x + read(x, positions, memory, memory_positions, hidden))
        x = self.norms[1](x + talk(x, positions, x, positions))
        return self.norms[2](x + self.ffns[0](x))


class QueryDecoder(nn.Module):
    """The layers, and the norm before every prediction."""

    def __init__(self, spec: MaskDecoderSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(QueryLayer(spec) for _ in range(spec.layers))
        self.post_norm = nn.LayerNorm(spec.width)


class MaskDecoder(Decoder):
    """Pixel decoder, query decoder and the heads of masks and classes.

    Predictions before the first layer and after each; each layer attends where the prediction
    before it sees its mask, one pyramid level after the other, coarsest first. Parameters are
    named as in the released checkpoints.

    text_dim: width of the class texts that the pixel decoder reads and the queries start from;
        None: no text.
    """

    scores: ClassVar[Literal["logits", "shares"]] = "shares"

    def __init__(
        self,
        spec: MaskDecoderSpec,
        channels: tuple[int, ...],
        num_classes: int,
        text_dim: int | None,
        queries: int,
    ) -> None:
        super().__init__()
        if len(channels) != LEVELS + 1:
            raise MFuserError(
                f"{spec.component()} takes {LEVELS + 1} pyramid levels, not {len(channels)}"
            )
        width = spec.width
        self.num_classes = num_classes
        self.losses = spec.losses()
        self.pixel_decoder = PixelDecoder(spec, channels, num_classes, text_dim)
        self.transformer_decoder = QueryDecoder(spec)
        if text_dim is not None:
            self.text_proj = nn.Sequential(
                nn.Linear(text_dim, width), nn.ReLU(), nn.Linear(width, width)
            )
        self.query_embed: nn.Embedding | nn.Linear = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        self.cls_embed = nn.Linear(width, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )

    def decode(
        self,
        x: Tensor,
        pyramid: list[Tensor],
        text: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> DecoderOutput:
        """Queries (B, Q, D), the pyramid, class texts (B, K, C) for the pixel decoder, the queries'
        own positions (Q, D); None: those that are learned."""
        own = self.query_embed.weight if positions is None else positions
        mask_feature, levels = self.pixel_decoder(pyramid, text)
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        memories = [
            level.flatten(2).transpose(1, 2) + encoding
            for level, encoding in zip(levels, self.level_embed.weight, strict=True)
        ]
        places = [sine_positions(shape, memories[0].shape[-1], memories[0]) for shape in shapes]
        output = DecoderOutput([])
        self._predict(x, mask_feature, output)
        for i, layer in enumerate(self.transformer_decoder.layers):
            level = i % LEVELS
            hidden = background(output.masks[-1], shapes[level])
            x = layer(x, own, memories[level], places[level], hidden)
            self._predict(x, mask_feature, output)
        return output

    def _predict(self, x: Tensor, mask_feature: Tensor, output: DecoderOutput) -> None:
        """Append the prediction of queries x (B, Q, D)."""
        x = self.transformer_decoder.post_norm(x)
        output.classes.append(self.cls_embed(x))
        output.masks.append(torch.einsum("bqd,bdhw->bqhw", self.mask_embed(x), mask_feature))

    def semantic_logits(self, output: DecoderOutput, size: tuple[int, int]) -> Tensor:
        """Sum over queries of class probability times mask probability, in [0, Q]."""
        return class_scores(output, size)


def class_scores(output: DecoderOutput, size: tuple[int, int]) -> Tensor:
    """Sum over queries of class probability times mask probability: (B, K, *size), in [0, Q]."""
    # In bfloat16 near scores would become equal, here and again where they are resized.
    classes = at_least_float32(output.classes[-1]).softmax(-1)[..., :-1]
    masks = at_least_float32(output.masks[-1]).sigmoid()
    scores = torch.einsum("bqk,bqhw->bkhw", classes, masks)
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


@torch.no_grad()
def background(masks: Tensor, shape: tuple[int, int]) -> Tensor:
    """The pixels hidden from each query: (B, Q, h, w) logits -> (B, Q, N), bool, N = that shape.

    True where the predicted mask is background. A query whose whole mask is background attends
    everywhere.
    """
    resized = F.interpolate(masks, shape, mode="bilinear", align_corners=False)
    hidden = (resized < 0).flatten(2)
    return hidden & ~hidden.all(-1, keepdim=True)


def deep_names(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Losses of the predictions, in order -> `loss_*` of the last, `d<i>.loss_*` of the i-th."""
    last = len(each) - 1
    return {
        ("" if i == last else f"d{i}.") + name: loss
        for i, losses in enumerate(each)
        for name, loss in losses.items()
    }


class MaskDecoderSpec(MaskLossSpec, PixelSpec):
    """The options of these decoders (documented where they are named)."""

    tiny: ClassVar[Mapping[str, Any]] = {
        "width": 32,
        "pixel_layers": 1,
        "pixel_ffn": 32,
        "layers": 1,
        "ffn": 32,
        "num_points": 64,
    }

    layers: PositiveInt = 9
    ffn: PositiveInt = 2048

    @model_validator(mode="after")
    def _divides(self) -> MaskDecoderSpec:
        # 4: sine and cosine of two axes.
        divisors = {"heads": self.heads, "norm_groups": self.norm_groups, "2 x 2 axes": 4}
        for what, divisor in divisors.items():
            if self.width % divisor:
                raise ValueError(f"width {self.width} is not a multiple of {divisor} ({what})")
        return self
