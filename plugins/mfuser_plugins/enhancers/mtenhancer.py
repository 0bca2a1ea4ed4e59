"""MTEnhancer, the text enhancer of the paper (section 4.2): attention, scan and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import EnhancerSpec, hookimpl
from mfuser_plugins.enhancers._reading import (
    MLP,
    Attention,
    AttentionSpec,
    ReadingEnhancer,
    read_image,
)
from mfuser_plugins.fusion.mvfuser import MVFuser, MVFuserSpec


class Layer(nn.Module):
    """Self-attention among classes, a scan over [text ; image ; text], an MLP (eq. 7-10).

    The scan is causal: the image tokens are conditioned on the first copy of the text, and the
    second copy on the whole image. Both copies are the normalized text, and the outputs of both
    are added to the text.
    """

    def __init__(self, spec: MTEnhancerSpec) -> None:
        super().__init__()
        width = spec.width
        self.self_attn = Attention(width, spec.heads, spec.dropout)
        # Released under this name; it is a scan, not an attention.
        self.cross_attn = MVFuser(width, MVFuserSpec(state_size=spec.state_size))
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = MLP(width, spec.dropout)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """text (B, K, D), visual (B, T, D) -> (B, K, D)."""
        text = text + self.self_attn(self.norm1(text))  # eq. 7
        first, second = read_image(self.cross_attn, self.norm2(text), visual)  # eq. 8
        text = text + first + second  # eq. 9
        return text + self.dropout(self.mlp(self.norm3(text)))  # eq. 10


class MTEnhancer(ReadingEnhancer):
    """text + gamma * f(text, visual), with f at an internal width (paper, section 4.2)."""

    def __init__(self, spec: MTEnhancerSpec, text_dim: int) -> None:
        super().__init__(spec, text_dim, lambda: Layer(spec))


class MTEnhancerSpec(AttentionSpec, name="mtenhancer"):
    """MTEnhancer: class embeddings conditioned on the image by attention and a selective scan.

    width: of the enhancer, between projections from and to the joint text-image width.
    heads: of the self-attention; they divide the width.
    state_size: N, states per channel of the scan.
    layers: of the enhancer, one after the other. dropout: within them, while training.
    gamma_init: the gain on what is added to the text. "normal": drawn per channel with standard
        deviation 1, as released; a number: that everywhere, e.g. 1e-4 to start from the text.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"width": 32, "state_size": 2}

    state_size: PositiveInt = 16

    @model_validator(mode="after")
    def _even(self) -> MTEnhancerSpec:
        if self.width % 2:
            raise ValueError(f"width {self.width} must be even, e.g. {self.width + 1}")
        return self

    def build(self, text_dim: int, num_classes: int) -> MTEnhancer:
        return MTEnhancer(self, text_dim)


@hookimpl
def mfuser_components() -> list[type[EnhancerSpec]]:
    return [MTEnhancerSpec]
