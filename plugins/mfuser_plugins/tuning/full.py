"""The encoders' own blocks, trained whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mfuser import TuningSpec, VisionBackbone, hookimpl
from mfuser_plugins.tuning._blocks import BlocksSpec, train


class FullSpec(BlocksSpec, name="full"):
    """Chosen blocks train whole; what comes before and after them stays frozen.

    `freeze = false` of a backbone trains embeddings, norms and text encoder as well.

    encoders: ["vfm"], ["vlm"]; None: every encoder of the pairing.
    blocks: [first, after the last], from 0, e.g. [20, 24]; None: all.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"blocks": [0, 1]}

    def build(self, backbone: VisionBackbone) -> None:
        train(self.chosen(backbone), lambda *_: True, "parameters")


@hookimpl
def mfuser_components() -> list[type[TuningSpec]]:
    return [FullSpec]
