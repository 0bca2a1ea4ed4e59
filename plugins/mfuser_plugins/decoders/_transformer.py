"""Parts of both halves of the Mask2Former decoder: attention, feed-forward, positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention whose positions join queries and keys, not values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """query (B, Q, D), memory (B, N, D), positions that broadcast to them -> (B, Q, D).

        hidden (B, Q, N): the attention mask, True where a query may not attend.
        """
        if hidden is not None:
            hidden = hidden.repeat_interleave(self.attn.num_heads, 0)
        return self.attn(
            query + query_pos, memory + memory_pos, memory, attn_mask=hidden, need_weights=False
        )[0]


class FeedForward(nn.Module):
    """Linear, ReLU, linear. (The nesting gives the names of the released parameters.)"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU()), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def sine_positions(shape: tuple[int, int], width: int, like: Tensor) -> Tensor:
    """Sine and cosine of y and x at `width` / 4 wavelengths each -> (h * w, width).

    Positions run from one step to 2 pi over each axis (DETR, arXiv 2005.12872, appendix A.4).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    steps = torch.arange(width // 4, device=like.device, dtype=dtype)
    wavelengths = 10_000 ** (4 * steps / width)

    def axis(length: int) -> Tensor:
        places = torch.arange(1, length + 1, device=like.device, dtype=dtype)
        angles = (places / (length + 1e-6) * 2 * math.pi)[:, None] / wavelengths
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (length, width / 2)

    h, w = shape
    y = axis(h)[:, None].expand(h, w, -1)
    x = axis(w)[None].expand(h, w, -1)
    return torch.cat([y, x], -1).flatten(0, 1).to(like.dtype)


def pixel_centers(shape: tuple[int, int], like: Tensor) -> Tensor:
    """(x, y) of every pixel's center, in [0, 1], row by row -> (h * w, 2).

    At least float32: in bfloat16 a place on a map of 64 pixels is off by up to 0.25 of one.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    y, x = (
        (torch.arange(length, device=like.device, dtype=dtype) + 0.5) / length for length in shape
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
