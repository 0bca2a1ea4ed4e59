"""The text enhancer without its attention block: scan and MLP (paper, table 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import EnhancerSpec, hookimpl
from mfuser_plugins.enhancers._reading import MLP, ReadingEnhancer, ReadingSpec, read_image
from mfuser_plugins.fusion.mvfuser import MVFuser, MVFuserSpec


class ScanLayer(nn.Module):
    """A scan over [text ; image ; text] and an MLP (eq. 8-10), without eq. 7."""

    def __init__(self, spec: MambaOnlySpec) -> None:
        super().__init__()
        width = spec.width
        self.scan = MVFuser(width, MVFuserSpec(state_size=spec.state_size))
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, spec.dropout)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """text (B, K, D), visual (B, T, D) -> (B, K, D)."""
        first, second = read_image(self.scan, self.norm1(text), visual)  # eq. 8
        text = text + first + second  # eq. 9
        return text + self.dropout(self.mlp(self.norm2(text)))  # eq. 10


class MambaOnly(ReadingEnhancer):
    """MTEnhancer less its attention among the classes ("w.o. hybrid" of table 6)."""

    def __init__(self, spec: MambaOnlySpec, text_dim: int) -> None:
        super().__init__(spec, text_dim, lambda: ScanLayer(spec))


class MambaOnlySpec(ReadingSpec, name="mamba_only"):
    """Class embeddings conditioned on the image by a selective scan alone (paper, table 6).

    width: of the enhancer, between projections from and to the joint text-image width; even.
    state_size: N, states per channel of the scan.
    layers: of the enhancer, one after the other. dropout: within them, while training.
    gamma_init: as for mtenhancer.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"width": 32, "state_size": 2}

    state_size: PositiveInt = 16

    @model_validator(mode="after")
    def _even(self) -> MambaOnlySpec:
        if self.width % 2:
            raise ValueError(f"width {self.width} must be even, e.g. {self.width + 1}")
        return self

    def build(self, text_dim: int, num_classes: int) -> MambaOnly:
        return MambaOnly(self, text_dim)


@hookimpl
def mfuser_components() -> list[type[EnhancerSpec]]:
    return [MambaOnlySpec]
