"""MTEnhancer, the text enhancer of the paper (section 4.2): attention, scan and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import EnhancerSpec, TextEnhancer, hookimpl
from mfuser_plugins.fusion.mvfuser import MVFuser


class SelfAttention(nn.Module):
    """Multi-head self-attention; queries, keys and values without bias."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, D) -> (B, K, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, K, D / heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(out))


class Layer(nn.Module):
    """Self-attention among classes, a scan over [text ; image ; text], an MLP (eq. 7-10).

    The scan reads one way: the second copy of the text has seen the whole image, the first tells
    the image tokens what to be read for. The normalised text enters both, and both copies'
    outputs are added to the text.
    """

    def __init__(self, width: int, heads: int, state_size: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads, dropout)
        # Released under this name; it is a scan, not an attention.
        self.cross_attn = MVFuser(width, state_size)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """text (B, K, D), visual (B, T, D) -> (B, K, D)."""
        classes = text.shape[1]
        text = text + self.self_attn(self.norm1(text))
        copy = self.norm2(text)
        scanned = self.cross_attn(torch.cat([copy, visual, copy], 1))
        text = text + scanned[:, :classes] + scanned[:, -classes:]
        return text + self.dropout(self.mlp(self.norm3(text)))


class MTEnhancer(TextEnhancer):
    """text + gamma * f(text, visual), with f at its own width (paper, section 4.2)."""

    def __init__(
        self,
        text_dim: int,
        width: int = 256,
        heads: int = 4,
        layers: int = 1,
        state_size: int = 16,
        dropout: float = 0.1,
        gamma_init: Literal["normal"] | float = "normal",
    ) -> None:
        super().__init__()
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(text_dim), nn.Linear(text_dim, width), nn.LayerNorm(width)
        )
        self.text_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.decoder = nn.ModuleList(
            Layer(width, heads, state_size, dropout) for _ in range(layers)
        )
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text_dim))
        self.apply(_reset)
        self.gamma = nn.Parameter(torch.empty(text_dim))
        if gamma_init == "normal":
            nn.init.trunc_normal_(self.gamma)
        else:
            nn.init.constant_(self.gamma, gamma_init)

    def difference(self, text: Tensor, visual: Tensor) -> Tensor:
        """f: text (B, K, C), visual (B, 1 + T, C) -> (B, K, C)."""
        visual = self.memory_proj(visual)
        x = self.text_proj(text)
        for layer in self.decoder:
            x = layer(x, visual)
        return self.out_proj(x)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        return text + self.gamma * self.difference(text, visual)


def _reset(module: nn.Module) -> None:
    # As released: this includes the scan's dt_proj, whose bias is thereby zero and no longer
    # gives step sizes of 0.001 to 0.1.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MTEnhancerSpec(EnhancerSpec, name="mtenhancer"):
    """MTEnhancer: class embeddings that have read the image, by attention and a selective scan.

    width: of the enhancer, between projections from and to the joint text-image width.
    heads: of the self-attention; they divide the width.
    state_size: N, states per channel of the scan.
    gamma_init: the gain on what is added to the text. "normal": drawn per channel with standard
        deviation 1, as released; a number: that everywhere, e.g. 1e-4 to start from the text.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"width": 32, "state_size": 2}

    width: PositiveInt = 256
    heads: PositiveInt = 4
    layers: PositiveInt = 1
    state_size: PositiveInt = 16
    dropout: float = Field(default=0.1, ge=0, lt=1)
    gamma_init: Literal["normal"] | NonNegativeFloat = "normal"

    @model_validator(mode="after")
    def _divides(self) -> MTEnhancerSpec:
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"width {self.width} must be even and a multiple of heads {self.heads}"
            )
        return self

    def build(self, text_dim: int, num_classes: int) -> MTEnhancer:
        return MTEnhancer(
            text_dim,
            self.width,
            self.heads,
            self.layers,
            self.state_size,
            self.dropout,
            self.gamma_init,
        )


@hookimpl
def mfuser_components() -> list[type[EnhancerSpec]]:
    return [MTEnhancerSpec]
