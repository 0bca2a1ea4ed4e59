"""The norms of the encoders' blocks, trained alone."""

from __future__ import annotations

from torch import nn

from mfuser import TuningSpec, VisionBackbone, hookimpl
from mfuser_plugins.tuning._blocks import BlocksSpec, train


def is_norm(module: nn.Module) -> bool:
    """Layer norms and RMS norms, also those of the libraries, which have no common base class."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.lower().endswith("norm")


class LayerNormOnlySpec(BlocksSpec, name="layer_norm_only"):
    """Gains and biases of the norms in chosen blocks train (Zhao et al., ICLR 2024,
    arXiv 2312.11420).

    encoders: ["vfm"], ["vlm"]; None: every encoder of the pairing.
    blocks: [first, after the last], from 0, e.g. [8, 24]; None: all.
    """

    def build(self, backbone: VisionBackbone) -> None:
        train(self.chosen(backbone), lambda module, _: is_norm(module), "norms")


@hookimpl
def mfuser_components() -> list[type[TuningSpec]]:
    return [LayerNormOnlySpec]
