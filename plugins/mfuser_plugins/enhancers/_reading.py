"""Base of enhancers in which class texts read the image, at a width of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import EnhancerSpec, TextEnhancer


class Attention(nn.Module):
    """Multi-head attention; queries, keys and values without bias."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """(B, K, D), memory (B, M, D), or none for self-attention -> (B, K, D)."""
        memory = x if memory is None else memory
        q, k, v = (
            proj(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, tokens in ((self.q_proj, x), (self.k_proj, memory), (self.v_proj, memory))
        )  # (B, heads, K or M, D / heads)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(out))


class MLP(nn.Sequential):
    """Linear to four times the width, GELU, dropout, linear."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )


class ReadingEnhancer(TextEnhancer):
    """text + gamma * f(text, visual), with f at an internal width (paper, section 4.2).

    layer: makes one layer of f, (text (B, K, D), visual (B, T, D)) -> (B, K, D).
    """

    def __init__(self, spec: ReadingSpec, text_dim: int, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        width = spec.width
        self.memory_proj = nn.Sequential(
            nn.LayerNorm(text_dim), nn.Linear(text_dim, width), nn.LayerNorm(width)
        )
        self.text_proj = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.decoder = nn.ModuleList(layer() for _ in range(spec.layers))
        self.out_proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text_dim))
        self.apply(_reset)
        self.gamma = nn.Parameter(torch.empty(text_dim))
        if spec.gamma_init == "normal":
            nn.init.trunc_normal_(self.gamma)
        else:
            nn.init.constant_(self.gamma, spec.gamma_init)

    def difference(self, text: Tensor, visual: Tensor) -> Tensor:
        """f: text (B, K, C), visual (B, 1 + T, C) -> (B, K, C)."""
        visual = self.memory_proj(visual)
        x = self.text_proj(text)
        for layer in self.decoder:
            x = layer(x, visual)
        return self.out_proj(x)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        return text + self.gamma * self.difference(text, visual)


def read_image(scan: nn.Module, text: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of a scan over [text ; image ; text] at either copy of the text (paper, eq. 8).

    text (B, K, D), visual (B, T, D) -> (B, K, D) twice. The scan reads one way: the second copy has
    seen the whole image, the first tells the image tokens what to be read for.
    """
    scanned = scan(torch.cat([text, visual, text], 1))
    return scanned[:, : text.shape[1]], scanned[:, -text.shape[1] :]


def _reset(module: nn.Module) -> None:
    # As released. This includes the scan's dt_proj: its bias becomes zero, and step sizes no longer
    # start between 0.001 and 0.1.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ReadingSpec(EnhancerSpec):
    """The options of these enhancers (documented where they are named)."""

    tiny: ClassVar[Mapping[str, Any]] = {"width": 32}

    width: PositiveInt = 256
    layers: PositiveInt = 1
    dropout: float = Field(default=0.1, ge=0, lt=1)
    gamma_init: Literal["normal"] | NonNegativeFloat = "normal"


class AttentionSpec(ReadingSpec):
    """The options of enhancers with attention."""

    heads: PositiveInt = 4

    @model_validator(mode="after")
    def _divides(self) -> AttentionSpec:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self
