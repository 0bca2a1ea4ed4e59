"""The whole image in one pass, as mmsegmentation's mode "whole"."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mfuser import Inference, InferenceSpec, Network, hookimpl
from mfuser.model.sliding_window import at_least_float32

LEAST = 32
"""Pixels: the coarsest stride of the pyramid."""


class Whole(Inference):
    """One pass over the image, enlarged to whole patches by its own last row and column."""

    def __call__(self, network: Network, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        to = (height, width)
        if to != tuple(network.window):  # which is taken as in training, whole patches or not
            to = (_whole(height, network.patch[0]), _whole(width, network.patch[1]))
        if to != (height, width) and len(images):
            border = (0, to[1] - width, 0, to[0] - height)
            images = F.pad(at_least_float32(images), border, mode="replicate")
        return at_least_float32(network.scores(images))[..., :height, :width]


def _whole(side: int, patch: int) -> int:
    """The least multiple of the patch that holds `side` pixels and reaches the coarsest stride."""
    return -(-max(side, LEAST) // patch) * patch


class WholeSpec(InferenceSpec, name="whole"):
    """The whole image in one pass, whatever its size: positions are resampled to it.

    Memory and time grow with the square of the number of tokens where encoders attend to all.
    """

    def build(self) -> Whole:
        return Whole()


@hookimpl
def mfuser_components() -> list[type[InferenceSpec]]:
    return [WholeSpec]
