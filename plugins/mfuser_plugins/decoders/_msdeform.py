"""Multi-scale deformable attention in plain PyTorch (Deformable DETR, arXiv 2010.04159)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = list[tuple[int, int]]
"""(h, w) of each level, in the order in which their tokens are laid end to end."""


def deformable_attention(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted bilinear samples of every level (arXiv 2010.04159, eq. 3 without projections).

    Args:
        value: (B, N, heads, d), N = the sum of h * w.
        shapes: (h, w) of each level.
        locations: (B, Q, heads, levels, points, 2), (x, y) with the map's corners at 0 and 1;
            the map is zero outside them.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads * d)
    """
    batch, _, heads, _ = value.shape
    maps = value.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B * heads, d, N)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, levels, points, 2)
    weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # (B * heads, 1, Q, levels, …)
    levels = maps.split([h * w for h, w in shapes], -1)
    parts = []
    for i, shape in enumerate(shapes):
        level = levels[i].unflatten(-1, shape)
        sampled = F.grid_sample(level, grids[:, :, i], align_corners=False)
        parts.append((sampled * weights[:, :, :, i]).sum(-1))  # (B * heads, d, Q)
    out = torch.stack(parts).sum(0).unflatten(0, (batch, heads))
    return out.permute(0, 3, 1, 2).flatten(2).to(value.dtype)


class DeformableAttention(nn.Module):
    """Each query looks at `points` places per head and level, around its own position."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._reset()

    def _reset(self) -> None:
        """Heads start looking in directions spread over the circle, points 1, 2, … pixels out
        (arXiv 2010.04159, appendix A.4)."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = (directions[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for proj in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)

    def forward(self, query: Tensor, value: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        """query (B, Q, D), value (B, N, D), reference (Q, 2) as (x, y) in [0, 1] -> (B, Q, D)."""
        split = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*split, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        # Filled on the device: copied there, it would be waited for.
        sizes = torch.stack([reference.new_full((), n) for h, w in shapes for n in (w, h)])
        sizes = sizes.view(len(shapes), 1, 2)
        locations = reference[:, None, None, None] + offsets / sizes
        value = self.value_proj(value).unflatten(-1, (self.heads, -1))
        out = deformable_attention(value, shapes, locations, weights.unflatten(-1, split[1:]))
        return self.output_proj(out)
