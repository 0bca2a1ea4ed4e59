"""No enhancement: class queries are the text embeddings themselves (paper, table 6)."""

from __future__ import annotations

from torch import Tensor

from mfuser import EnhancerSpec, TextEnhancer, hookimpl


class NoEnhancer(TextEnhancer):
    """Hands the text embeddings on."""

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        return text


class NoEnhancerSpec(EnhancerSpec, name="none"):
    """Class queries are the text embeddings themselves, the same for every image."""

    def build(self, text_dim: int, num_classes: int) -> NoEnhancer:
        return NoEnhancer()


@hookimpl
def mfuser_components() -> list[type[EnhancerSpec]]:
    return [NoEnhancerSpec]
