"""Learned low-rank tokens that both encoders attend to (Rein; paper, table 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import FusionSpec, TokenShape, hookimpl
from mfuser_plugins.fusion._joint import Gain, Grid, JointAdapter, JointSpec, width_of


class CrossAttention(JointAdapter):
    """Rein's refinement (Wei et al., CVPR 2024, eq. 3-8) by one set of tokens for both encoders.

    The tokens are T = A B, of low rank. An encoder's tokens f compare themselves to T, and what
    they find is mapped and added:

        S     = softmax(f T' / sqrt(D))
        found = S[:, 1:] (T[1:] W_T + b_T)       the first token takes what needs no refinement
        delta = (f + found) W_f + b_f

    Rein shares W_T and W_f among all layers; here each position has its own. Encoders meet in the
    shared tokens and maps only. Linear in the number of tokens.
    """

    def __init__(
        self,
        spec: CrossAttentionSpec,
        vfm: TokenShape | None,
        vlm: TokenShape | None,
    ) -> None:
        super().__init__(vfm, vlm, width_of(vfm, vlm, spec.shared_width))
        tokens, rank = spec.tokens, spec.rank
        # Entries of A B with variance 1 / D, so that T has rows of length one.
        self.A = nn.Parameter(torch.randn(tokens, rank) * rank**-0.5)
        self.B = nn.Parameter(torch.randn(rank, self.width) * self.width**-0.5)
        self.map_tokens = nn.Linear(self.width, self.width)
        self.map_features = nn.Linear(self.width, self.width)
        self.gain = Gain(spec.dropout)

    def mix(self, streams: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        tokens = self.A @ self.B  # (m, D)
        # A value of zero for the first: its share of the softmax finds nothing.
        values = F.pad(self.map_tokens(tokens[1:]), (0, 0, 1, 0))
        return [self._offsets(stream, tokens, values) for stream in streams]

    def _offsets(self, stream: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
        shape = (len(stream), 1, *tokens.shape)  # one head
        found = F.scaled_dot_product_attention(
            stream.unsqueeze(1), tokens.expand(shape), values.expand(shape)
        ).squeeze(1)
        return self.gain(self.map_features(stream + found))


class CrossAttentionSpec(JointSpec, name="cross_attention"):
    """Attention of both encoders to one set of learned low-rank tokens (Rein; paper, table 4).

    tokens: how many; the first takes what needs no refinement. rank: of the matrix they form.
    dropout: on the offsets.
    shared_width: width of the tokens. None: the VLM's (the VFM's where there is no VLM).
    """

    tiny: ClassVar[Mapping[str, Any]] = {"tokens": 4, "rank": 2}

    tokens: int = Field(default=100, ge=2)
    rank: PositiveInt = 16

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> CrossAttention:
        return CrossAttention(self, vfm, vlm)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [CrossAttentionSpec]
