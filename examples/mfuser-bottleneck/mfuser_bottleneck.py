"""Attention bottlenecks (Nagrani et al., NeurIPS 2021) between two encoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mfuser import FusionAdapter, FusionSpec, TokenShape, hookimpl
from pydantic import PositiveInt
from torch import Tensor, nn

mfuser_requires = ">=0.1,<0.2"


class Bottleneck(nn.Module):
    """A few tokens through which two sequences exchange information (section 3.2, eq. 8-9).

    The bottleneck tokens read each sequence by itself and are averaged; then each sequence reads
    the average. The paper does both inside the layers of one transformer; here the encoders are
    frozen, so it is done beside them, at a width of its own.
    """

    def __init__(self, widths: list[int], tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(tokens, width))
        self.down = nn.ModuleList(nn.Linear(w, width) for w in widths)
        self.up = nn.ModuleList(nn.Linear(width, w) for w in widths)
        for up in self.up:
            nn.init.zeros_(up.weight)  # the encoders start as they are
            nn.init.zeros_(up.bias)

    def forward(self, sequences: list[Tensor]) -> list[Tensor]:
        """Sequences (B, N_i, D_i) -> an offset to add to each, of the same shapes."""
        low = [down(x) for down, x in zip(self.down, sequences, strict=True)]  # (B, N_i, width)
        tokens = self.tokens.expand(len(sequences[0]), -1, -1)
        read = [F.scaled_dot_product_attention(tokens, x, x) for x in low]
        shared = torch.stack(read).mean(0)  # (B, tokens, width)
        back = [F.scaled_dot_product_attention(x, shared, shared) for x in low]
        return [up(x) for up, x in zip(self.up, back, strict=True)]


class BottleneckAdapter(FusionAdapter):
    def __init__(self, vfm: TokenShape, vlm: TokenShape, tokens: int, width: int) -> None:
        super().__init__()
        self.bottleneck = Bottleneck([vfm.embed_dim, vlm.embed_dim], tokens, width)

    def forward(
        self,
        vfm_tokens: Tensor | None,
        vlm_tokens: Tensor | None,
        vfm_grid: tuple[int, int] | None = None,
        vlm_grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        assert vfm_tokens is not None and vlm_tokens is not None, "single_tower is False"
        vfm_offset, vlm_offset = self.bottleneck([vfm_tokens, vlm_tokens])
        return vfm_offset, vlm_offset


class BottleneckSpec(FusionSpec, name="bottleneck"):
    """Attention bottlenecks: the encoders exchange information through a few learned tokens.

    tokens: in the bottleneck (4 in the paper).
    width: of the bottleneck.
    """

    tokens: PositiveInt = 4
    width: PositiveInt = 64

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> BottleneckAdapter:
        assert vfm is not None and vlm is not None, "single_tower is False"
        return BottleneckAdapter(vfm, vlm, self.tokens, self.width)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [BottleneckSpec]
