"""Learned low-rank tokens, what patches find among them, and their link to queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser import MFuserError, TokenRefiner


class LowRankTokens(nn.Module):
    """T = A B for each block: (depth, tokens, D), of low rank (arXiv 2312.04265, section 3.3)."""

    def __init__(self, depth: int, tokens: int, rank: int, width: int) -> None:
        super().__init__()
        # Entries of A B with variance 1 / D, so that T has rows of length one.
        self.A = nn.Parameter(torch.randn(depth, tokens, rank) * rank**-0.5)
        self.B = nn.Parameter(torch.randn(depth, rank, width) * width**-0.5)

    def forward(self, i: int | None = None) -> Tensor:
        """The tokens of block `i` (tokens, D), or of all blocks."""
        tokens: Tensor = self.A @ self.B if i is None else self.A[i] @ self.B[i]
        return tokens


def found(patches: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """Attention of patches (B, T, D) to tokens (m, D): softmax(f T' / sqrt(D)) times values
    (m - 1, D). The first token has no value: it absorbs what needs no refinement."""
    shape = (len(patches), 1, *tokens.shape)  # one head
    values = F.pad(values, (0, 0, 1, 0))
    return F.scaled_dot_product_attention(
        patches.unsqueeze(1), tokens.expand(shape), values.expand(shape)
    ).squeeze(1)


class LinkedTokens(TokenRefiner):
    """A refiner whose tokens make the first queries of a decoder that takes some (arXiv 2312.04265,
    section 3.3):

        Q = [max_i Q_i, mean_i Q_i, Q_N] W_Q + b_Q, with Q_i = T_i W + b

    name: of the tuning, for messages. linkable: False for a refiner that is to make none.
    """

    def __init__(self, name: str, linkable: bool) -> None:
        super().__init__()
        self.name, self.linkable = name, linkable
        self.each: nn.Linear | None = None
        self.join: nn.Linear | None = None

    def linked(self) -> LowRankTokens:
        """The tokens that make queries."""
        raise NotImplementedError

    def link(self, queries: int, width: int) -> bool:
        if not self.linkable:
            return False
        tokens, own = self.linked().A.shape[1], self.linked().B.shape[2]
        if queries != tokens:
            raise MFuserError(
                f"tuning '{self.name}' has {tokens} tokens, and the decoder {queries} queries, "
                "which they are linked to: give both one number (tuning.tokens, decoder.queries), "
                "or set tuning.link = false"
            )
        self.each, self.join = nn.Linear(own, width), nn.Linear(3 * width, width)
        return True

    def queries(self) -> Tensor:
        assert self.each is not None and self.join is not None, "link() comes first"
        each = self.each(self.linked()())  # (depth, m, width)
        return self.join(torch.cat([each.amax(0), each.mean(0), each[-1]], dim=-1))
