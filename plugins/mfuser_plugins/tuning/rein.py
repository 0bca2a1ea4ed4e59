"""Rein: learned low-rank tokens that refine the patches after each block, linked to the queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import TuningSpec, VisionBackbone, hookimpl
from mfuser_plugins.tuning._tokens import LinkedTokens, LowRankTokens, found


class Rein(LinkedTokens):
    """Wei et al., CVPR 2024 (arXiv 2312.04265), sections 3.2 and 3.3: tokens T_i of each block i,
    one set of maps for all blocks.

        found = softmax(f T' / sqrt(D))[:, 1:] (T[1:] W_T + b_T)
        f     = f + s ((f + found) W_f + b_f)

    Prefix tokens are not refined. s is one learned number, 0.001 at first, as in the published
    configuration.
    """

    def __init__(self, spec: ReinSpec, depth: int, width: int) -> None:
        super().__init__("rein", spec.link)
        self.tokens = LowRankTokens(depth, spec.tokens, spec.rank, width)
        self.map_tokens = nn.Linear(width, width)
        self.map_patches = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def linked(self) -> LowRankTokens:
        return self.tokens

    def forward(self, i: int, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.tokens(i)
        refined = self.map_patches(patches + found(patches, tokens, self.map_tokens(tokens[1:])))
        return patches + self.scale * refined


class ReinSpec(TuningSpec, name="rein"):
    """Rein: after each block, patches attend to learned low-rank tokens of that block.

    The tokens also make the first queries of a decoder that learns queries (mask2former); of two
    encoders, the first one's do.

    encoders: ["vfm"], ["vlm"]; None: every encoder of the pairing, each with tokens of its own.
    tokens: of each block; the first takes what needs no refinement. rank: of the matrix they form.
    link: make the decoder's first queries from the tokens, where it takes some.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"tokens": 20, "rank": 2}

    tokens: int = Field(default=100, ge=2)
    rank: PositiveInt = 16
    link: bool = True

    def build(self, backbone: VisionBackbone) -> None:
        backbone.refiner = Rein(self, backbone.depth, backbone.embed_dim)


@hookimpl
def mfuser_components() -> list[type[TuningSpec]]:
    return [ReinSpec]
