"""The text enhancer without its attention block: scan and MLP (paper, table 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import EnhancerSpec, hookimpl
from mfuser_plugins.enhancers._reading import MLP, Gamma, ReadingEnhancer
from mfuser_plugins.fusion.mvfuser import MVFuser


class ScanLayer(nn.Module):
    """A scan over [text ; image ; text] and an MLP (eq. 8-10), without eq. 7."""

    def __init__(self, width: int, state_size: int, dropout: float) -> None:
        super().__init__()
        self.scan = MVFuser(width, state_size)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """text (B, K, D), visual (B, T, D) -> (B, K, D)."""
        classes = text.shape[1]
        copy = self.norm1(text)
        scanned = self.scan(torch.cat([copy, visual, copy], 1))
        text = text + scanned[:, :classes] + scanned[:, -classes:]
        return text + self.dropout(self.mlp(self.norm2(text)))


class MambaOnly(ReadingEnhancer):
    """MTEnhancer less its attention among the classes ("w.o. hybrid" of table 6)."""

    def __init__(
        self,
        text_dim: int,
        width: int = 256,
        layers: int = 1,
        state_size: int = 16,
        dropout: float = 0.1,
        gamma_init: Gamma = "normal",
    ) -> None:
        super().__init__(
            text_dim, width, lambda: ScanLayer(width, state_size, dropout), layers, gamma_init
        )


class MambaOnlySpec(EnhancerSpec, name="mamba_only"):
    """Class embeddings that have read the image by a selective scan alone (paper, table 6).

    width: of the enhancer, between projections from and to the joint text-image width; even.
    state_size: N, states per channel of the scan.
    layers: of the enhancer, one after the other. dropout: within them, while training.
    gamma_init: as for mtenhancer.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"width": 32, "state_size": 2}

    width: PositiveInt = 256
    layers: PositiveInt = 1
    state_size: PositiveInt = 16
    dropout: float = Field(default=0.1, ge=0, lt=1)
    gamma_init: Literal["normal"] | NonNegativeFloat = "normal"

    @model_validator(mode="after")
    def _even(self) -> MambaOnlySpec:
        if self.width % 2:
            raise ValueError(f"width {self.width} must be even, e.g. {self.width + 1}")
        return self

    def build(self, text_dim: int, num_classes: int) -> MambaOnly:
        return MambaOnly(
            text_dim, self.width, self.layers, self.state_size, self.dropout, self.gamma_init
        )


@hookimpl
def mfuser_components() -> list[type[EnhancerSpec]]:
    return [MambaOnlySpec]
