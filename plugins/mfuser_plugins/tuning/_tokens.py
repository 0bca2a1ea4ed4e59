"""Learned low-rank tokens, and what patches find among them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
