"""The same prediction for two views of a crop that differ in their colors alone.

Photometric consistency is what many methods of domain generalization share, e.g. Zhao et al.,
"Style-Hallucinated Dual Consistency Learning", ECCV 2022, which asks for consistent predictions of
an image and its restyled copy; there restyled by statistics of its features, here by jitter.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from mfuser import Loss, LossInputs, LossParts, LossSpec, Need, hookimpl


class Consistency(Loss):
    """The distance of the class probabilities of two views, mean over all pixels."""

    def __init__(self, spec: ConsistencySpec) -> None:
        super().__init__()
        from torchvision.transforms import v2  # heavy

        self.distance, self.symmetric = spec.distance, spec.symmetric
        self.jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)

    @torch.no_grad()
    def view(self, images: Tensor) -> Tensor:
        """Each image's colors changed by chance, by torch's generator."""
        return torch.stack([self.jitter(image) for image in images])

    def forward(self, given: LossInputs) -> dict[str, Tensor]:
        first = given.log_probs
        second = given.view.log_probs if given.view is not None else None
        assert first is not None and second is not None, "both are declared in `needs`"
        if not self.symmetric:
            first = first.detach()
        if self.distance == "mse":
            return {"mse": (first.exp() - second.exp()).square().sum(1).mean()}
        # sum_k p (log p - log q)
        divergence = F.kl_div(second, first, reduction="none", log_target=True)
        return {"kl": divergence.sum(1).mean()}


class ConsistencySpec(LossSpec, name="consistency"):
    """Equal predictions for two views of each crop that differ in their colors.

    The second view goes through the whole model, which takes about as much again of time and
    memory as the first.

    distance: of the class probabilities: "kl", the divergence of the second view's from the
        first's, or "mse", the squared distance.
    symmetric: both views move; else the first, which the labels teach, is the second's target.
    brightness, contrast, saturation, hue: the largest changes, as torchvision's ColorJitter takes
        them.
    """

    needs: ClassVar[tuple[Need, ...]] = ("log_probs", "view")

    distance: Literal["kl", "mse"] = "kl"
    symmetric: bool = False
    brightness: NonNegativeFloat = 0.5
    contrast: NonNegativeFloat = 0.5
    saturation: NonNegativeFloat = 0.5
    hue: float = Field(default=0.1, ge=0, le=0.5)

    def build(self, parts: LossParts) -> Consistency:
        return Consistency(self)


@hookimpl
def mfuser_components() -> list[type[LossSpec]]:
    return [ConsistencySpec]
