"""Self-attention over the tokens of both encoders, laid end to end (paper, table 3)."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from mfuser import FusionSpec, TokenShape, hookimpl
from mfuser_plugins.fusion._attention import Attention
from mfuser_plugins.fusion._joint import Gain, Grid, JointAdapter, JointSpec, heads_for, width_of


class SelfAttentionConcat(JointAdapter):
    """attn(q, k, v = [VFM tokens ; VLM tokens]), as "self-attn (concat.)" of the paper.

    Quadratic in the number of tokens. 4.20 M parameters and 98.64 GFLOPs at D = 1024, batch 2,
    2 x 1297 tokens.
    """

    def __init__(
        self,
        spec: SelfAttentionConcatSpec,
        vfm: TokenShape | None,
        vlm: TokenShape | None,
    ) -> None:
        super().__init__(vfm, vlm, width_of(vfm, vlm, spec.shared_width))
        self.attention = Attention(
            self.width, heads_for(self.width, spec.heads, "self_attention_concat")
        )
        self.gain = Gain(spec.dropout)

    def mix(self, streams: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        joint = torch.cat(streams, 1)
        offsets = self.gain(self.attention(joint, joint))
        return list(offsets.split([tokens.shape[1] for tokens in streams], 1))


class SelfAttentionConcatSpec(JointSpec, name="self_attention_concat"):
    """Self-attention over the tokens of both encoders together (paper, table 3).

    heads: they divide the width. None: one per 64 channels.
    dropout: on the offsets.
    shared_width: width of the attention. None: the VLM's (the VFM's where there is no VLM).
    """

    heads: PositiveInt | None = None

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> SelfAttentionConcat:
        return SelfAttentionConcat(self, vfm, vlm)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [SelfAttentionConcatSpec]
