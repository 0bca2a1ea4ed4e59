"""A long sequence taken block by block, so that what is computed of it stays in a CPU's caches.

For inference only: a GPU wants the whole length at once, and training keeps everything anyway. A
block sees one neighbor on each side, for the convolutions, and the scan's state of the block
before it; the result is that of the whole (tests/plugins/fusion/test_mvfuser.py).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, CHUNK = 3072, 64
"""Tokens of a block, at most; in whole chunks of the scan, so that its result is the same to the
last bit."""

Ends = tuple[bool, bool]
"""Whether a piece of a sequence holds its beginning and its end. Where it does not, its first or
last token is a neighbor, which convolutions see and for which nothing is returned."""
WHOLE: Ends = (True, True)


class Step(Protocol):
    """Offsets of a piece (B, L, D) without its neighbors, and the scan's last state."""

    def __call__(
        self, tokens: Tensor, ends: Ends = ..., state: Tensor | None = ...
    ) -> tuple[Tensor, Tensor]: ...


def pay(tokens: Tensor) -> bool:
    """Whether blocks are worth it for a sequence (B, L, D)."""
    # Asked first: an exported model must not depend on the length.
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return tokens.shape[0] * tokens.shape[1] > BLOCK


def in_blocks(step: Step, tokens: Tensor) -> Tensor:
    """`step` over a whole sequence (B, L, D), in even shares of at most BLOCK tokens."""
    batch, length, _ = tokens.shape
    count = -(-batch * length // BLOCK)
    size = -(-length // (count * CHUNK)) * CHUNK
    out, state = torch.empty_like(tokens), None
    for start in range(0, length, size):
        stop = min(start + size, length)
        left, right = max(start - 1, 0), min(stop + 1, length)
        piece = tokens[:, left:right].contiguous()
        out[:, start:stop], state = step(piece, (left == start, right == stop), state)
    return out


def depthwise(x: Tensor, conv: nn.Conv1d, ends: Ends = WHOLE) -> Tensor:
    """`conv` along the sequence: (B, L, D) -> (B, L, D), without the neighbors of a piece.

    As a picture of height 1 in "channels last", which (B, L, D) already is in memory: conv1d would
    copy it to (B, D, L), and the scan back, together half of what the projections cost.
    """
    begins, stops = ends
    if begins != stops:
        x = F.pad(x, (0, 0, int(begins), int(stops)))
    picture = x.transpose(1, 2).unsqueeze(2)  # (B, D, 1, L)
    weight = conv.weight.unsqueeze(2)  # (D, 1, 1, 3)
    padding = (0, int(begins and stops))
    return F.conv2d(picture, weight, padding=padding, groups=conv.groups).squeeze(2).transpose(1, 2)
