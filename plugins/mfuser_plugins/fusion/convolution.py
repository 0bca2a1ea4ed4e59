"""The spatial branch of MVFuser alone, with 2-D convolutions on the patch grid (paper, table 4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mfuser import FusionSpec, MFuserError, TokenShape, hookimpl
from mfuser_plugins.fusion._joint import (
    Gain,
    Grid,
    JointAdapter,
    JointSpec,
    nothing_for_prefix,
    patch_maps,
    width_of,
)


class Convolution(JointAdapter):
    """Half the width, a 3x3 depth-wise convolution, SiLU, back (paper, section 5.3).

    Both encoders pass through the same weights, each on its own grid, so that what one learns
    shapes the other, but no token sees the other encoder. Prefix tokens, which have no place on
    the grid, are left alone.

    Raises MFuserError if the width is odd.
    """

    def __init__(
        self,
        spec: ConvolutionSpec,
        vfm: TokenShape | None,
        vlm: TokenShape | None,
    ) -> None:
        width = width_of(vfm, vlm, spec.shared_width)
        if width % 2:
            raise MFuserError(
                f"convolution: a width of {width} cannot be halved; set shared_width to an even "
                f"number, e.g. {width + 1}"
            )
        super().__init__(vfm, vlm, width)
        half = width // 2
        self.in_proj = nn.Linear(width, half, bias=False)
        self.conv = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.out_proj = nn.Linear(half, width, bias=False)
        self.gain = Gain(spec.dropout)

    def mix(self, streams: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        return [
            nothing_for_prefix(self._offsets(tokens, grid), tokens)
            for tokens, grid in zip(streams, grids, strict=True)
        ]

    def _offsets(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, N, D) -> offsets of the patches (B, h * w, D)."""
        x = F.silu(self.conv(patch_maps(self.in_proj(tokens), grid)))
        return self.gain(self.out_proj(x.flatten(2).transpose(1, 2)))


class ConvolutionSpec(JointSpec, name="convolution"):
    """A bottleneck with a 3x3 convolution on each encoder's patch grid (paper, table 4).

    dropout: on the offsets.
    shared_width: width of the bottleneck's ends. None: the VLM's (the VFM's without a VLM).
    """

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> Convolution:
        return Convolution(self, vfm, vlm)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [ConvolutionSpec]
