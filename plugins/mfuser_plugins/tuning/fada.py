"""FADA: learned tokens for the low and for the high frequencies of the patches of each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import TokenRefiner, TuningSpec, VisionBackbone, hookimpl
from mfuser_plugins.tuning._tokens import LowRankTokens, found


def bands(maps: Tensor) -> Tensor:
    """(B, h, w, D) -> Haar bands (4, B, h', w', D), LL, LH, HL, HH, of half the size; an odd side
    is continued by its last row or column."""
    if maps.shape[1] % 2:
        maps = torch.cat([maps, maps[:, -1:]], dim=1)
    if maps.shape[2] % 2:
        maps = torch.cat([maps, maps[:, :, -1:]], dim=2)
    upper, lower = maps[:, 0::2], maps[:, 1::2]
    quarters = (upper[:, :, 0::2], upper[:, :, 1::2], lower[:, :, 0::2], lower[:, :, 1::2])
    return _haar(quarters)


def joined(parts: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `bands`: (4, B, h', w', D) -> (B, h, w, D) of the grid (h, w)."""
    a, b, c, d = _haar(tuple(parts))
    rows = [torch.stack(pair, dim=3).flatten(2, 3) for pair in ((a, b), (c, d))]
    return torch.stack(rows, dim=2).flatten(1, 2)[:, : grid[0], : grid[1]]


def _haar(four: tuple[Tensor, ...]) -> Tensor:
    """The 4 x 4 Haar matrix, which is its own inverse."""
    a, b, c, d = four
    return torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]) / 2


def instance_norm(x: Tensor) -> Tensor:
    """(B, T, D): every channel of every image to mean 0 and variance 1 over its T positions."""
    centered = x - x.mean(1, keepdim=True)
    return centered * (centered.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class Branch(nn.Module):
    """delta = s ((f + found) W + b): tokens of each block, one set of maps for all blocks."""

    def __init__(self, spec: FadaSpec, depth: int, width: int) -> None:
        super().__init__()
        self.tokens = LowRankTokens(depth, spec.tokens, spec.rank, width)
        self.map_tokens = nn.Linear(width, width)
        self.map_patches = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def forward(self, i: int, patches: Tensor) -> Tensor:
        tokens = self.tokens(i)
        offsets: Tensor = self.map_patches(
            patches + found(patches, tokens, self.map_tokens(tokens[1:]))
        )
        return self.scale * offsets


class Fada(TokenRefiner):
    """Bi et al., NeurIPS 2024 (openreview b7hmPlOqr8): content and style apart, by frequency.

    The patches' Haar bands are refined and joined again: the low band, of content, by tokens of its
    own; the three high bands, of style, by others, after an instance norm that takes the style out.
    How a band meets its tokens is Rein's rule, with maps shared by all blocks.
    """

    def __init__(self, spec: FadaSpec, depth: int, width: int) -> None:
        super().__init__()
        self.low = Branch(spec, depth, width)
        self.high = Branch(spec, depth, width)

    def forward(self, i: int, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        four = bands(patches.unflatten(1, grid))  # (4, B, h', w', D)
        half = (four.shape[2], four.shape[3])
        low = self.low(i, four[0].flatten(1, 2))
        high = self.high(i, instance_norm(four[1:].flatten(0, 1).flatten(1, 2)))
        offsets = torch.cat([low, high]).unflatten(1, half).unflatten(0, (4, len(patches)))
        # The transform is linear: what is added to the bands is added to the patches.
        return patches + joined(offsets, grid).flatten(1, 2)


class FadaSpec(TuningSpec, name="fada"):
    """FADA: after each block, learned low-rank tokens refine the low and the high frequencies of
    the patches, those of high frequency without their style.

    encoders: ["vfm"], ["vlm"]; None: every encoder of the pairing, each with tokens of its own.
    tokens: of each block and branch; the first takes what needs no refinement. rank: of the matrix
        that they form.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"tokens": 4, "rank": 2}

    tokens: int = Field(default=100, ge=2)
    rank: PositiveInt = 16

    def build(self, backbone: VisionBackbone) -> None:
        backbone.refiner = Fada(self, backbone.depth, backbone.embed_dim)


@hookimpl
def mfuser_components() -> list[type[TuningSpec]]:
    return [FadaSpec]
