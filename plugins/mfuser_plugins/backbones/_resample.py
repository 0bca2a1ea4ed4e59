"""Resampling of position tables and patch kernels for other grids and patch sizes.

Conventions differ between libraries and change features (antialiasing changes the cubic
coefficient, and so affects upsampling too), so they are options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]

Interpolation = Literal["bicubic", "bilinear"]
PatchResample = Literal["bicubic", "bilinear", "pinv"]


@dataclass(frozen=True)
class Resampling:
    """interpolation, antialias: of position tables. patch: of patch kernels."""

    interpolation: Interpolation = "bicubic"
    antialias: bool = False
    patch: PatchResample = "bicubic"


def resample_positions(table: Tensor, old: Grid, new: Grid, prefix: int, how: Resampling) -> Tensor:
    """(prefix + old h·w, D) -> (prefix + new h·w, D); the prefix rows stay as they are."""
    if old == new:
        return table
    head, grid = table[:prefix], table[prefix:]
    image = grid.float().view(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    image = F.interpolate(
        image, new, mode=how.interpolation, align_corners=False, antialias=how.antialias
    )
    rows = image.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)
    return rows if prefix == 0 else torch.cat([head, rows])


def resample_kernel(kernel: Tensor, size: Grid, how: Resampling) -> Tensor:
    """(D, 3, p, p) -> (D, 3, *size).

    "pinv" is FlexiViT's pseudo-inverse (Beyer et al. 2023, section 3.4): a patch enlarged with
    its image keeps its embedding. "bicubic" and "bilinear" resize the kernel like an image.
    """
    if tuple(kernel.shape[-2:]) == size:
        return kernel
    if how.patch == "pinv":
        from timm.layers import resample_patch_embed

        return resample_patch_embed(kernel, list(size))
    resized = F.interpolate(kernel.float(), size, mode=how.patch, align_corners=False)
    return resized.to(kernel.dtype)
