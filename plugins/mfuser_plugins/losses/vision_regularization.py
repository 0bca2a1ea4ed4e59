"""tqdm's vision regularization: what an image as a whole means stays what it meant.

Pak et al., "Textual Query-Driven Mask Transformer for Domain Generalized Segmentation", ECCV 2024;
read off its code (MIT, ByeongHyunPak/tqdm, 75168af): the mean squared difference of the global
embedding and that of the vision-language model as it was before training.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mfuser import Loss, LossInputs, LossParts, LossSpec, Need, hookimpl


class VisionRegularization(Loss):
    """On the global embedding, and on the dense ones where `dense`."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, given: LossInputs) -> dict[str, Tensor]:
        assert given.visual is not None and given.frozen is not None, "declared in `needs`"
        found = {"global": F.mse_loss(given.visual[:, 0], given.frozen[:, 0])}
        if self.dense:
            found["dense"] = F.mse_loss(given.visual[:, 1:], given.frozen[:, 1:])
        return found


class VisionRegularizationSpec(LossSpec, name="vision_regularization"):
    """The image embedding stays near that of the vision-language model before training (tqdm).

    A copy of the model's state before training runs beside it, unless it stays as it is: then what
    fusion and merge add to it is held small.

    dense: also the embeddings of the patches, each by itself; tqdm regularizes the global one.
    """

    needs: ClassVar[tuple[Need, ...]] = ("text", "frozen")

    dense: bool = False

    def build(self, parts: LossParts) -> VisionRegularization:
        return VisionRegularization(self.dense)


@hookimpl
def mfuser_components() -> list[type[LossSpec]]:
    return [VisionRegularizationSpec]
