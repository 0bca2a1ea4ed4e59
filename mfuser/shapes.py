"""Declarations of components: shapes of tokens, models that can be built, ways to read a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True)
class BackboneInfo:
    """A model that a backbone component can build, as `mfuser list backbones --all` shows it.

    tokens: of a 448x448 image, prefix included. license: of the published weights, where their
        publisher states one. tried: whether it was laid out and stepped. refused: why it cannot
        be used.
    """

    name: str
    width: int | None = None
    depth: int | None = None
    patch: int | None = None
    tokens: int | None = None
    license: str | None = None
    tried: bool = False
    refused: str | None = None


@dataclass(frozen=True)
class Proposal:
    """How a dataset component would read a folder that somebody has.

    options: of the component, without its name. classes: names in the order of their ids.
    found: sentences on what is there, for people; odd: those that need a decision.
    score: 0 to 1, how surely the folder is of this component's kind. size: (width, height) of most
    images, where they were looked at.
    """

    options: dict[str, Any]
    classes: tuple[str, ...]
    found: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    score: float = 0.5
    size: tuple[int, int] | None = None
