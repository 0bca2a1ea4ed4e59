"""A text enhancer with cross-attention to the image in place of the scan (paper, table 6)."""

from __future__ import annotations

from torch import Tensor, nn

from mfuser import EnhancerSpec, hookimpl
from mfuser_plugins.enhancers._reading import MLP, Attention, AttentionSpec, ReadingEnhancer


class CrossAttentionLayer(nn.Module):
    """Self-attention among classes, attention of classes to the image, an MLP.

    A transformer decoder layer, as in DenseCLIP's context-aware prompting (arXiv 2112.01518,
    section 3.3); MTEnhancer's layer with eq. 8-9 replaced.
    """

    def __init__(self, spec: CrossAttentionEnhancerSpec) -> None:
        super().__init__()
        width = spec.width
        self.self_attn = Attention(width, spec.heads, spec.dropout)
        self.cross_attn = Attention(width, spec.heads, spec.dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = MLP(width, spec.dropout)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """text (B, K, D), visual (B, T, D) -> (B, K, D)."""
        text = text + self.self_attn(self.norm1(text))
        text = text + self.cross_attn(self.norm2(text), visual)
        return text + self.dropout(self.mlp(self.norm3(text)))


class CrossAttentionEnhancer(ReadingEnhancer):
    """text + gamma * f(text, visual), f a transformer decoder."""

    def __init__(self, spec: CrossAttentionEnhancerSpec, text_dim: int) -> None:
        super().__init__(spec, text_dim, lambda: CrossAttentionLayer(spec))


class CrossAttentionEnhancerSpec(AttentionSpec, name="cross_attention"):
    """Class embeddings conditioned on the image by cross-attention (paper, table 6).

    width: of the enhancer, between projections from and to the joint text-image width.
    heads: of both attentions; they divide the width.
    layers: of the enhancer, one after the other. dropout: within them, while training.
    gamma_init: as for mtenhancer.
    """

    def build(self, text_dim: int, num_classes: int) -> CrossAttentionEnhancer:
        return CrossAttentionEnhancer(self, text_dim)


@hookimpl
def mfuser_components() -> list[type[EnhancerSpec]]:
    return [CrossAttentionEnhancerSpec]
