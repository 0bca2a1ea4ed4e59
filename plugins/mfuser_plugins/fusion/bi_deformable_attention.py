"""Deformable attention in both directions between the patch grids (paper, table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mfuser import FusionSpec, TokenShape, hookimpl
from mfuser_plugins.decoders._msdeform import DeformableAttention
from mfuser_plugins.decoders._transformer import pixel_centers
from mfuser_plugins.fusion._joint import (
    Gain,
    Grid,
    JointAdapter,
    JointSpec,
    heads_for,
    nothing_for_prefix,
    patches,
    width_of,
)


class BiDeformableAttention(JointAdapter):
    """Every patch of either encoder samples the maps of both, around its own place.

    Deformable DETR's attention (arXiv 2010.04159) with the two encoders' patch grids as its
    levels: 8 heads x 2 levels x 4 points = 64 samples a patch. The paper gives a size only; maps
    of queries, values and output, D x D each, and those 64 points come to it: 3.35 M parameters and
    34.65 GFLOPs at D = 1024, batch 2, 2 x 1296 patches. Prefix tokens, which have no place, are
    left alone. Linear in the number of patches.
    """

    def __init__(
        self,
        spec: BiDeformableAttentionSpec,
        vfm: TokenShape | None,
        vlm: TokenShape | None,
    ) -> None:
        super().__init__(vfm, vlm, width_of(vfm, vlm, spec.shared_width))
        levels = (vfm is not None) + (vlm is not None)
        heads = heads_for(self.width, spec.heads, "bi_deformable_attention")
        self.query = nn.Linear(self.width, self.width)
        self.attention = DeformableAttention(self.width, heads, levels, spec.points)
        self.gain = Gain(spec.dropout)

    def mix(self, streams: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        maps = [patches(tokens, grid) for tokens, grid in zip(streams, grids, strict=True)]
        joint = torch.cat(maps, 1)
        places = torch.cat([pixel_centers(grid, joint) for grid in grids])  # (T_vfm + T_vlm, 2)
        offsets = self.gain(self.attention(self.query(joint), joint, places, grids))
        parts = offsets.split([part.shape[1] for part in maps], 1)
        return [
            nothing_for_prefix(part, tokens) for part, tokens in zip(parts, streams, strict=True)
        ]


class BiDeformableAttentionSpec(JointSpec, name="bi_deformable_attention"):
    """Deformable attention of each encoder's patches to both patch grids (paper, table 3).

    heads: they divide the width. points: samples a head takes of each grid.
    dropout: on the offsets.
    shared_width: width of the attention. None: the VLM's (the VFM's where there is no VLM).
    """

    tiny: ClassVar[Mapping[str, Any]] = {"heads": 2, "points": 1}

    heads: PositiveInt = 8
    points: PositiveInt = 4

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> BiDeformableAttention:
        return BiDeformableAttention(self, vfm, vlm)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [BiDeformableAttentionSpec]
