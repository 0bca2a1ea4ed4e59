"""Each encoder attends to the other through its own attention layer (paper, table 3)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor

from mfuser import FusionSpec, TokenShape, hookimpl
from mfuser_plugins.fusion._attention import Attention
from mfuser_plugins.fusion._joint import Gain, Grid, JointAdapter, JointSpec, heads_for, width_of


class SelfAttentionSeparate(JointAdapter):
    """attn(q = VFM, k, v = VLM) and attn(q = VLM, k, v = VFM): "self-attn (separate)".

    Quadratic in the number of tokens. 8.40 M parameters and 71.08 GFLOPs at D = 1024, batch 2,
    2 x 1297 tokens.
    """

    def __init__(
        self,
        spec: SelfAttentionSeparateSpec,
        vfm: TokenShape,
        vlm: TokenShape,
    ) -> None:
        super().__init__(vfm, vlm, width_of(vfm, vlm, spec.shared_width))
        heads = heads_for(self.width, spec.heads, "self_attention_separate")
        self.vfm_reads = Attention(self.width, heads)
        self.vlm_reads = Attention(self.width, heads)
        self.vfm_gain = Gain(spec.dropout)
        self.vlm_gain = Gain(spec.dropout)

    def mix(self, streams: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        vfm, vlm = streams
        return [
            self.vfm_gain(self.vfm_reads(vfm, vlm)),
            self.vlm_gain(self.vlm_reads(vlm, vfm)),
        ]


class SelfAttentionSeparateSpec(JointSpec, name="self_attention_separate"):
    """Two attentions, by which each encoder reads the other (paper, table 3).

    heads: they divide the width. None: one per 64 channels.
    dropout: on the offsets.
    shared_width: width of the attentions. None: the VLM's.
    """

    single_tower: ClassVar[bool] = False

    heads: PositiveInt | None = None

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> SelfAttentionSeparate:
        assert vfm is not None and vlm is not None, "a single tower is refused"
        return SelfAttentionSeparate(self, vfm, vlm)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [SelfAttentionSeparateSpec]
