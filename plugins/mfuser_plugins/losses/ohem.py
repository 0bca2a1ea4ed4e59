"""Online hard example mining: the cross-entropy of the pixels that the model finds hard.

Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining", CVPR
2016; for pixels as in mmsegmentation's OHEMPixelSampler: those whose class has a probability below
a threshold, and at least a number of the hardest ones (there a fixed number, here a share).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mfuser import Loss, LossInputs, LossParts, LossSpec, Need, hookimpl, whole_batch
from mfuser_plugins.losses._per_pixel import cross_entropy


class Ohem(Loss):
    """Mean over the pixels that are hard, of all images of the batch together."""

    def __init__(self, threshold: float, least: float) -> None:
        super().__init__()
        self.threshold, self.least = threshold, least

    def forward(self, given: LossInputs) -> dict[str, Tensor]:
        losses, _ = cross_entropy(given)
        every = whole_batch.concatenated(losses.detach())
        if not len(every):
            return {"ce": losses.sum()}
        hardest = every.sort(descending=True).values
        kept = max(1, math.ceil(self.least * len(every)))
        # Hard: a probability below the threshold, or among the hardest that are always kept.
        bound = hardest[kept - 1].clamp(max=-math.log(self.threshold))
        hard = losses[losses.detach() >= bound]
        share = whole_batch.share(torch.tensor(len(hard), device=losses.device))
        if not len(hard):  # others of the step's processes have some
            return {"ce": losses.sum() * 0}
        return {"ce": hard.mean() * share}


class OhemSpec(LossSpec, name="ohem"):
    """Cross-entropy of the hard pixels alone (online hard example mining).

    threshold: pixels are hard whose class has at most this probability.
    least: the share of labeled pixels, the hardest ones, that is always kept.
    """

    needs: ClassVar[tuple[Need, ...]] = ("log_probs",)

    threshold: float = Field(default=0.7, gt=0, le=1)
    least: float = Field(default=0.1, gt=0, le=1)

    def build(self, parts: LossParts) -> Ohem:
        return Ohem(self.threshold, self.least)


@hookimpl
def mfuser_components() -> list[type[LossSpec]]:
    return [OhemSpec]
