"""The biases of the encoders' blocks, trained alone."""

from __future__ import annotations

from mfuser import TuningSpec, VisionBackbone, hookimpl
from mfuser_plugins.tuning._blocks import BlocksSpec, train


class BiasSpec(BlocksSpec, name="bias"):
    """Biases of linear layers and norms in chosen blocks train (BitFit; Ben Zaken et al.,
    ACL 2022, arXiv 2106.10199).

    encoders: ["vfm"], ["vlm"]; None: every encoder of the pairing.
    blocks: [first, after the last], from 0, e.g. [8, 24]; None: all.
    """

    def build(self, backbone: VisionBackbone) -> None:
        # EVA's query and value biases are parameters of the attention: q_bias, v_bias.
        train(self.chosen(backbone), lambda _, name: name.endswith("bias"), "biases")


@hookimpl
def mfuser_components() -> list[type[TuningSpec]]:
    return [BiasSpec]
