"""Cross-entropy in which rare classes count for more.

Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, section 4. There
the counts are of a data set's images, here of the labeled pixels of the batch, so that nothing has
to be counted before.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mfuser import Loss, LossInputs, LossParts, LossSpec, Need, hookimpl, whole_batch
from mfuser_plugins.losses._per_pixel import cross_entropy


class ClassBalanced(Loss):
    """A pixel of class k weighs (1 - beta) / (1 - beta^n_k), n_k pixels of it in the batch, scaled
    so that the weights of the classes that are there average to one."""

    def __init__(self, classes: int, beta: float) -> None:
        super().__init__()
        self.classes, self.beta = classes, beta

    def forward(self, given: LossInputs) -> dict[str, Tensor]:
        losses, labels = cross_entropy(given)
        counts = torch.zeros(self.classes, dtype=torch.float64, device=labels.device)
        counts = counts.index_add(0, labels, torch.ones_like(labels, dtype=torch.float64))
        counts = whole_batch.total(counts)
        there = counts > 0
        if not there.any():
            return {"ce": losses.sum()}
        # In float64: 1 - beta^n of a beta close to one loses its digits in less.
        weights = ((1 - self.beta) / (1 - self.beta ** counts.clamp_min(1))).where(there, 0)
        weights = weights * there.sum() / weights.sum()
        of_pixels = weights.to(losses.dtype)[labels]
        all_pixels = of_pixels.sum()
        share = whole_batch.share(all_pixels)
        if not len(losses):  # others of the step's processes have some
            return {"ce": losses.sum()}
        return {"ce": (of_pixels * losses).sum() / all_pixels * share}


class ClassBalancedSpec(LossSpec, name="class_balanced"):
    """Cross-entropy weighted by the effective number of pixels of each class.

    beta: 0 weighs all pixels alike; toward 1, a class by the inverse of its pixels in the batch.
    """

    needs: ClassVar[tuple[Need, ...]] = ("log_probs",)

    beta: float = Field(default=0.9999, ge=0, lt=1)

    def build(self, parts: LossParts) -> ClassBalanced:
        return ClassBalanced(len(parts.classes), self.beta)


@hookimpl
def mfuser_components() -> list[type[LossSpec]]:
    return [ClassBalancedSpec]
