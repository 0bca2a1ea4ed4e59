"""EoMT: a vision transformer that segments by itself, with learned queries or with the class texts.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025 (arXiv 2503.19108).
Queries join the tokens in the last blocks, and a small head reads masks and classes off them:

    patches -> blocks -> [queries ; patches] -> last blocks -> norm -> queries -> classes, MLP -+
                                                                 |                              v
                                                                 +---> patches -> upscaled -> masks

Written from the paper; the authors' code is under the MIT license.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import (
    DecoderOutput,
    DecoderSpec,
    JoiningDecoder,
    LastBlocks,
    MFuserError,
    TokenShape,
    hookimpl,
)
from mfuser_plugins.decoders._mask_decoder import class_scores, deep_names
from mfuser_plugins.decoders._mask_losses import MaskLossSpec, class_masks
from mfuser_plugins.decoders._per_pixel import given
from mfuser_plugins.decoders.mask2former import matched_losses

Size = tuple[int, int]


class ScaleBlock(nn.Module):
    """Twice the size: transposed convolution, GELU, depthwise 3x3, LayerNorm over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, 2h, 2w)."""
        x = self.conv2(F.gelu(self.conv1(x)))
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class EoMT(JoiningDecoder):
    """Queries in the encoder's last blocks. Parameters are named as in the authors' code.

    While training, a prediction is made before each of the blocks and after the last one, all are
    supervised, and in each block a query sees the patches of its predicted mask alone, with a
    probability that falls from 1 to 0, block after block (mask annealing). In inference only the
    last prediction is made, and nothing is masked (spec.masks = "annealed").

    text_dim: width of the class texts that the queries are projected from; None: learned queries.
    Raises MFuserError for fewer learned queries than classes: every class of a crop needs one.
    """

    scores: ClassVar[Literal["logits", "shares"]] = "shares"

    def __init__(
        self,
        spec: EomtOptions,
        width: int,
        patch: int,
        queries: int,
        num_classes: int,
        text_dim: int | None,
    ) -> None:
        super().__init__()
        self.name, self.num_classes = spec.component(), num_classes
        if queries < num_classes:
            raise MFuserError(
                f"{self.name}: {queries} queries cannot answer for {num_classes} classes, which "
                f"may all be in one crop; set queries to {num_classes} or more"
            )
        self.losses, self.masks, self.power = spec.losses(), spec.masks, spec.power
        self.annealing = spec.spans()
        self.q = nn.Embedding(queries, width)
        self.from_text = None
        if text_dim is not None:
            self.from_text = nn.Sequential(
                nn.Linear(text_dim, width), nn.GELU(), nn.Linear(width, width)
            )
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        doublings = max(1, int(math.log2(patch)) - 2)
        self.upscale = nn.Sequential(*(ScaleBlock(width) for _ in range(doublings)))

    def join(self, blocks: LastBlocks, queries: Tensor | None = None) -> DecoderOutput:
        """Masks at a quarter of the image, or nearly (patches whose size is not a power of two)."""
        x = self.q.weight.expand(blocks.batch, -1, -1)
        if self.from_text is not None:
            x = x + self.from_text(given(queries, self.name))
        output = DecoderOutput([])
        for k in range(blocks.count):
            visible, share = None, self.masked_share(k)
            if share > 0 or (self.training and self.masks != "never"):
                masks = self._predict(x, blocks, output)
                visible = seen(masks, blocks.grid, share) if share > 0 else None
            x = blocks.step(x, visible)
        self._predict(x, blocks, output)
        return output

    def masked_share(self, block: int) -> float:
        """The share of queries that are masked in a block, now."""
        if self.masks != "annealed":
            return float(self.masks == "always")
        if not self.training:
            return 0.0
        start, end = self.annealing[block]
        done = min(max((self.progress - start) / (end - start), 0.0), 1.0)
        return float((1 - done) ** self.power)

    def _predict(self, x: Tensor, blocks: LastBlocks, output: DecoderOutput) -> Tensor:
        """Append the prediction of queries x (B, Q, D) as they stand; returns its masks."""
        x, patches = blocks.look(x)
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_head(x), self.upscale(patches))
        output.classes.append(self.class_head(x))
        output.masks.append(masks)
        return masks

    def loss(self, output: DecoderOutput, labels: Tensor) -> dict[str, Tensor]:
        """Weighted losses: `loss_*` of the last prediction, `d<i>.loss_*` of the i-th."""
        there = class_masks(labels, self.num_classes)
        predictions = list(zip(output.masks, output.classes, strict=True))
        if self.from_text is None:
            each = matched_losses(predictions, there, self.losses)
        else:
            each = [self.losses(masks, classes, there) for masks, classes in predictions]
        return deep_names(self.losses.in_whole_batch(each, there, output.classes[-1].shape[1]))

    def semantic_logits(self, output: DecoderOutput, size: Size) -> Tensor:
        """Sum over queries of class probability times mask probability, in [0, Q]."""
        return class_scores(output, size)


@torch.no_grad()
def seen(masks: Tensor, grid: Size, share: float) -> Tensor:
    """The patches that each query sees: (B, Q, h, w) logits -> (B, Q, N), bool.

    Those of its mask; of the share of queries that is not masked, all.
    """
    resized = F.interpolate(masks, grid, mode="bilinear", align_corners=False)
    visible = (resized > 0).flatten(2)
    if share < 1:
        free = torch.rand(visible.shape[:2], device=visible.device) > share
        visible = visible | free.unsqueeze(-1)
    return visible


Span = tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]]


class EomtOptions(MaskLossSpec):
    """The options of both (documented where they are named)."""

    tiny: ClassVar[Mapping[str, Any]] = {"blocks": 1, "num_points": 64}

    blocks: PositiveInt = 4
    masks: Literal["annealed", "always", "never"] = "annealed"
    annealing: tuple[Span, ...] | None = None
    power: PositiveFloat = 0.9

    @model_validator(mode="after")
    def _spans(self) -> EomtOptions:
        if self.annealing is not None:
            if len(self.annealing) != self.blocks:
                raise ValueError(
                    f"annealing gives {len(self.annealing)} spans for {self.blocks} blocks; write "
                    "one for each, or leave it out"
                )
            wrong = [span for span in self.annealing if span[0] >= span[1]]
            if wrong:
                raise ValueError(
                    f"annealing: the span {list(wrong[0])} does not end after it starts"
                )
        return self

    def spans(self) -> tuple[Span, ...]:
        """Each block's interval: as given, else consecutive shares of blocks + 2, as published."""
        if self.annealing is not None:
            return self.annealing
        parts = self.blocks + 2
        return tuple(((k + 1) / parts, (k + 2) / parts) for k in range(self.blocks))

    def joins(self) -> int:
        return self.blocks


class EomtSpec(EomtOptions, name="eomt"):
    """EoMT: learned queries join the tokens in the encoder's last blocks. Takes no text.

    With fusion the adapters still act between those blocks, on the encoders' own tokens. Of two
    encoders it is the VFM's blocks that are joined. There is no pyramid.

    queries: at least as many as there are classes.
    blocks: the last blocks that the queries join; published: 4 of ViT-L, 3 of smaller ones, 5 of g.
    masks: whether a query sees the patches of its own predicted mask alone. "annealed": while
        training, less and less; "always": in inference too; "never": at no time, and then the last
        prediction alone is supervised.
    annealing: of each block the span of the training, [start, end] in [0, 1], over which its masks
        vanish. None: of 4 blocks one sixth after the other, from 1/6 to 5/6, as published.
    power: of the decay within a span.
    num_points, oversample, importance, cls_weight, mask_weight, dice_weight, no_object: as in
        mask2former.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"queries": 20, **EomtOptions.tiny}

    queries: PositiveInt = 100

    def build_joining(
        self, tokens: TokenShape, patch_size: Size, num_classes: int, text_dim: int | None
    ) -> EoMT:
        return EoMT(self, tokens.embed_dim, max(patch_size), self.queries, num_classes, None)


class TextEomtSpec(EomtOptions, name="text_eomt"):
    """EoMT whose queries are the class texts, with fixed matching; the paper's are learned.

    Text k, projected, and a learned vector are query k, which answers for class k. The texts come
    as the VLM gives them: an enhancer would read what comes after the blocks that are joined.

    blocks, masks, annealing, power: as in eomt.
    num_points, oversample, importance, cls_weight, mask_weight, dice_weight, no_object: as in
        text_mask2former.
    """

    needs_text: ClassVar[bool] = True

    def build_joining(
        self, tokens: TokenShape, patch_size: Size, num_classes: int, text_dim: int | None
    ) -> EoMT:
        assert text_dim is not None, "a pairing without text is refused"
        return EoMT(self, tokens.embed_dim, max(patch_size), num_classes, num_classes, text_dim)


@hookimpl
def mfuser_components() -> list[type[DecoderSpec]]:
    return [EomtSpec, TextEomtSpec]
