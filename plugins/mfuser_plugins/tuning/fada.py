"""FADA: learned tokens for the low and for the high frequencies of the patches of each block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import MFuserError, TuningSpec, VisionBackbone, hookimpl
from mfuser_plugins.tuning._tokens import LinkedTokens, LowRankTokens


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


def _haar(four: tuple[Tensor, ...]) -> Tensor:
    """The 4 x 4 Haar matrix, which is its own inverse."""
    a, b, c, d = four
    return torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]) / 2


def spread(parts: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bands (K, B, h', w', D) -> (B, T, K D / 4) of the grid (h, w): of each band, every one of the
    four patches of a block takes a quarter of the channels."""
    count, batch, h, w, width = parts.shape
    quarters = parts.unflatten(-1, (2, 2, width // 4)).permute(1, 2, 4, 3, 5, 0, 6)
    full = quarters.reshape(batch, 2 * h, 2 * w, count * (width // 4))
    return full[:, : grid[0], : grid[1]].flatten(1, 2)


def of_channels(patches: Tensor) -> Tensor:
    """(B, T, D) -> (4, B, T, D / 4): the Haar bands of each patch's channels, as a square map."""
    side = math.isqrt(patches.shape[-1])
    return bands(patches.reshape(-1, side, side, 1)).reshape(4, *patches.shape[:2], -1)


def instance_norm(x: Tensor) -> Tensor:
    """(…, m): every row to mean 0 and variance 1."""
    centered = x - x.mean(-1, keepdim=True)
    return centered * (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


class Branch(nn.Module):
    """(x + found) W + b: tokens of each block, one set of maps for all blocks.

    temperature: of the similarities, by which they are divided. normalized: these are first brought
    to mean 0 and variance 1, patch by patch.
    """

    def __init__(
        self, spec: FadaSpec, depth: int, width: int, temperature: float, normalized: bool
    ) -> None:
        super().__init__()
        self.temperature, self.normalized = temperature, normalized
        self.tokens = LowRankTokens(depth, spec.tokens, spec.rank, width)
        self.map_tokens = nn.Linear(width, width)
        self.map_patches = nn.Linear(width, width)

    def forward(self, i: int, x: Tensor) -> Tensor:
        tokens = self.tokens(i)
        alike = x @ tokens.T
        if self.normalized:
            alike = instance_norm(alike)
        share = (alike / self.temperature).softmax(-1)[..., 1:]
        offsets: Tensor = self.map_patches(x + share @ self.map_tokens(tokens[1:]))
        return offsets


class Fada(LinkedTokens):
    """Bi et al., NeurIPS 2024 (openreview b7hmPlOqr8): content and style apart, by frequency.

    Of four Haar bands the low one, of content, is a quarter of a patch's channels and has tokens of
    its own; the three high ones, of style, are the others, and their similarities to their tokens
    are normalized. Both are refined by Rein's rule, and not transformed back:

        f = f + s [low, high]

    Bands of "patches": of 2 x 2 patches, spread over them. Of "channels": of the channels of one
    patch, as a square map. The latter is what the authors' code does (github.com/JingjunYi/FADA,
    built on Rein), which reshapes tokens into maps without transposing them; it was read, and
    nothing of it is copied. The low tokens also make the decoder's queries, as there.
    """

    def __init__(self, spec: FadaSpec, depth: int, width: int) -> None:
        super().__init__("fada", spec.link)
        if width % 4:
            raise MFuserError(
                f"tuning 'fada' gives each band a quarter of the channels, and {width} channels "
                "are not a multiple of 4"
            )
        if spec.transform == "channels" and math.isqrt(width) ** 2 != width:
            raise MFuserError(
                f"tuning 'fada' reads the channels of a patch as a square map, and {width} is no "
                'square number; set tuning.transform = "patches"'
            )
        self.transform = spec.transform
        quarter, temperature = width // 4, width**0.5
        self.low = Branch(spec, depth, quarter, temperature, normalized=False)
        self.high = Branch(spec, depth, 3 * quarter, temperature, normalized=True)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def linked(self) -> LowRankTokens:
        return self.low.tokens

    def forward(self, i: int, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.transform == "channels":
            four = of_channels(patches)
            low, high = four[0], four[1:].movedim(0, 2).flatten(2)
        else:
            four = bands(patches.unflatten(1, grid))  # (4, B, h', w', D)
            low, high = spread(four[:1], grid), spread(four[1:], grid)
        return patches + self.scale * torch.cat([self.low(i, low), self.high(i, high)], dim=-1)


class FadaSpec(TuningSpec, name="fada"):
    """FADA: after each block, learned low-rank tokens refine the low and the high frequencies of
    the patches, those of high frequency without their style.

    encoders: ["vfm"], ["vlm"]; None: every encoder of the pairing, each with tokens of its own.
    tokens: of each block and branch; the first takes what needs no refinement. rank: of the matrix
        that they form.
    link: make the decoder's first queries from the low tokens, where it takes some.
    transform: of the "patches", frequencies of the image; or of each patch's "channels", as the
        authors' code does, for widths that are the square of an even number.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"tokens": 20, "rank": 2}

    tokens: int = Field(default=100, ge=2)
    rank: PositiveInt = 16
    link: bool = True
    transform: Literal["patches", "channels"] = "patches"

    def build(self, backbone: VisionBackbone) -> None:
        backbone.refiner = Fada(self, backbone.depth, backbone.embed_dim)


@hookimpl
def mfuser_components() -> list[type[TuningSpec]]:
    return [FadaSpec]
