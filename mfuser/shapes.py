"""Shapes that the parts of a model declare to each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenShape:
    """The token sequence of a backbone at the model's image size.

    It is (B, N, embed_dim) with N = num_prefix_tokens + grid[0] * grid[1]:
    prefix tokens (class, registers) first, then the patch grid row by row.
    """

    embed_dim: int
    grid: tuple[int, int]
    num_prefix_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]
