"""A text enhancer that reads the image by cross-attention in place of the scan (paper, table 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import EnhancerSpec, hookimpl
from mfuser_plugins.enhancers._reading import MLP, Attention, Gamma, ReadingEnhancer


class CrossAttentionLayer(nn.Module):
    """Self-attention among classes, attention of classes to the image, an MLP.

    A transformer decoder layer, as in DenseCLIP's context-aware prompting (arXiv 2112.01518,
    section 3.3); MTEnhancer's layer with eq. 8-9 replaced.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = Attention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = MLP(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """text (B, K, D), visual (B, T, D) -> (B, K, D)."""
        text = text + self.self_attn(self.norm1(text))
        text = text + self.cross_attn(self.norm2(text), visual)
        return text + self.dropout(self.mlp(self.norm3(text)))


class CrossAttentionEnhancer(ReadingEnhancer):
    """text + gamma * f(text, visual), f a transformer decoder."""

    def __init__(
        self,
        text_dim: int,
        width: int = 256,
        heads: int = 4,
        layers: int = 1,
        dropout: float = 0.1,
        gamma_init: Gamma = "normal",
    ) -> None:
        super().__init__(
            text_dim, width, lambda: CrossAttentionLayer(width, heads, dropout), layers, gamma_init
        )


class CrossAttentionEnhancerSpec(EnhancerSpec, name="cross_attention"):
    """Class embeddings that have read the image by cross-attention (paper, table 6).

    width: of the enhancer, between projections from and to the joint text-image width.
    heads: of both attentions; they divide the width.
    layers: of the enhancer, one after the other. dropout: within them, while training.
    gamma_init: as for mtenhancer.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"width": 32}

    width: PositiveInt = 256
    heads: PositiveInt = 4
    layers: PositiveInt = 1
    dropout: float = Field(default=0.1, ge=0, lt=1)
    gamma_init: Literal["normal"] | NonNegativeFloat = "normal"

    @model_validator(mode="after")
    def _divides(self) -> CrossAttentionEnhancerSpec:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self

    def build(self, text_dim: int, num_classes: int) -> CrossAttentionEnhancer:
        return CrossAttentionEnhancer(
            text_dim, self.width, self.heads, self.layers, self.dropout, self.gamma_init
        )


@hookimpl
def mfuser_components() -> list[type[EnhancerSpec]]:
    return [CrossAttentionEnhancerSpec]
