"""Base of adapters that work at one width: maps to it and back, order, near-zero offsets."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import FusionAdapter, FusionSpec, MFuserError, TokenShape

Grid = tuple[int, int]


def width_of(vfm: TokenShape | None, vlm: TokenShape | None, shared_width: int | None) -> int:
    """The width at which both encoders meet: as asked, else the VLM's, else the VFM's."""
    width = shared_width or (vlm.embed_dim if vlm else None) or (vfm.embed_dim if vfm else None)
    assert width is not None, "a pairing has an encoder"
    return width


def maps(
    tokens: int | None, width: int, always: bool = False, near_zero: bool = True
) -> tuple[nn.Module, nn.Module]:
    """Linear maps from an encoder's width to the adapter's and back, or nothing.

    near_zero: the map back starts without bias; else the offsets would start at that bias (up to
        0.03 at width 1024, as in the released CLIP models), not near zero.
    """
    if tokens is None or (tokens == width and not always):
        return nn.Identity(), nn.Identity()
    back = nn.Linear(width, tokens)
    if near_zero:
        nn.init.zeros_(back.bias)
    return nn.Linear(tokens, width), back


class JointAdapter(FusionAdapter):
    """Brings both encoders' tokens to one width, `mix`es them, and takes the offsets back.

    `vfm_in` and `vfm_out` map the VFM's tokens and offsets where its width is another, `vlm_in`
    and `vlm_out` the VLM's; elsewhere they do nothing.
    """

    def __init__(
        self,
        vfm: TokenShape | None,
        vlm: TokenShape | None,
        width: int,
        map_vfm: bool = False,
        near_zero: bool = True,
    ) -> None:
        super().__init__()
        self.width = width
        self.grids = (vfm.grid if vfm else None, vlm.grid if vlm else None)
        self.vfm_in, self.vfm_out = maps(vfm.embed_dim if vfm else None, width, map_vfm, near_zero)
        self.vlm_in, self.vlm_out = maps(vlm.embed_dim if vlm else None, width, near_zero=near_zero)

    @abstractmethod
    def mix(self, streams: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        """Tokens (B, N, D) of the encoders that are there, VFM first, their grids -> offsets."""

    def forward(
        self,
        vfm_tokens: Tensor | None,
        vlm_tokens: Tensor | None,
        vfm_grid: Grid | None = None,
        vlm_grid: Grid | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        streams, grids = [], []
        for tokens, into, grid, declared in (
            (vfm_tokens, self.vfm_in, vfm_grid, self.grids[0]),
            (vlm_tokens, self.vlm_in, vlm_grid, self.grids[1]),
        ):
            if tokens is not None:
                streams.append(into(tokens))
                grid = grid or declared
                assert grid is not None, "tokens come with a grid"
                grids.append(grid)
        offsets = self.mix(streams, grids)
        vfm_offset = None if vfm_tokens is None else self.vfm_out(offsets[0])
        vlm_offset = None if vlm_tokens is None else self.vlm_out(offsets[-1])
        return vfm_offset, vlm_offset


class Gain(nn.Module):
    """Dropout, then a learned scalar from 0.001: MVFuser's way to start near zero (released)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def forward(self, offsets: Tensor) -> Tensor:
        return self.dropout(offsets) * self.scale


def patch_maps(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, N, D), prefix tokens first -> the patches as a map (B, D, h, w)."""
    return patches(tokens, grid).transpose(1, 2).unflatten(2, grid)


def patches(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, N, D), prefix tokens first -> (B, h * w, D)."""
    return tokens[:, tokens.shape[1] - grid[0] * grid[1] :]


def nothing_for_prefix(offsets: Tensor, like: Tensor) -> Tensor:
    """Offsets of patches (B, h * w, D) -> of all tokens of `like`, zero for prefix tokens."""
    return F.pad(offsets, (0, 0, like.shape[1] - offsets.shape[1], 0))


class JointSpec(FusionSpec):
    """The options of adapters that work at one width, starting near zero.

    shared_width: that width. None: the VLM's (the VFM's where there is no VLM).
    dropout: on the offsets.
    """

    single_tower: ClassVar[bool] = True

    shared_width: PositiveInt | None = None
    dropout: float = Field(default=0.1, ge=0, lt=1)


def heads_for(width: int, heads: int | None, name: str) -> int:
    """Heads as asked, else one per 64 channels, or as many fewer as divide the width.

    Raises MFuserError if `heads` does not divide the width.
    """
    if heads is None:
        return next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
    if width % heads:
        nearest = min(
            (h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - heads)
        )
        raise MFuserError(
            f"{name}: {heads} heads do not divide the width of {width}; use heads = {nearest}, or "
            "leave it out"
        )
    return heads
