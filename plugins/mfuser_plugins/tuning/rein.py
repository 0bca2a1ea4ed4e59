"""Rein: learned low-rank tokens that refine the patches after each block, linked to the queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import MFuserError, TokenRefiner, TuningSpec, VisionBackbone, hookimpl
from mfuser_plugins.tuning._tokens import LowRankTokens, found


class Rein(TokenRefiner):
    """Wei et al., CVPR 2024 (arXiv 2312.04265), sections 3.2 and 3.3: tokens T_i of each block i,
    one set of maps for all blocks.

        found = softmax(f T' / sqrt(D))[:, 1:] (T[1:] W_T + b_T)
        f     = f + s ((f + found) W_f + b_f)
        Q     = [max_i Q_i, mean_i Q_i, Q_N] W_Q + b_Q, with Q_i = T_i W + b

    Q are the first queries of the decoder, where it takes some. Prefix tokens are not refined. s is
    one learned number, 0.001 at first, as in the published configuration.
    """

    def __init__(self, spec: ReinSpec, depth: int, width: int) -> None:
        super().__init__()
        self.tokens = LowRankTokens(depth, spec.tokens, spec.rank, width)
        self.map_tokens = nn.Linear(width, width)
        self.map_patches = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self.linkable = spec.link
        self.each: nn.Linear | None = None
        self.join: nn.Linear | None = None

    def forward(self, i: int, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.tokens(i)
        refined = self.map_patches(patches + found(patches, tokens, self.map_tokens(tokens[1:])))
        return patches + self.scale * refined

    def link(self, queries: int, width: int) -> bool:
        if not self.linkable:
            return False
        tokens, own = self.tokens.A.shape[1], self.tokens.B.shape[2]
        if queries != tokens:
            raise MFuserError(
                f"tuning 'rein' has {tokens} tokens, and the decoder {queries} queries, which they "
                f"are linked to: give both one number (tuning.tokens, decoder.queries), or set "
                "tuning.link = false"
            )
        self.each, self.join = nn.Linear(own, width), nn.Linear(3 * width, width)
        return True

    def queries(self) -> Tensor:
        assert self.each is not None and self.join is not None, "link() comes first"
        each = self.each(self.tokens())  # (depth, m, width)
        return self.join(torch.cat([each.amax(0), each.mean(0), each[-1]], dim=-1))


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
