"""A pass at reduced size, then the uncertain regions again at the full one.

The idea of "Unleashing the Power of Visual Foundation Models for Generalizable Semantic
Segmentation" (VFMNet with MGRNet, AAAI 2025): a coarse prediction, whose regions of low confidence
are refined from the image in high resolution. There a second network, trained for it, refines the
first one's masks; here the same model is asked again, so that nothing is to be trained, and its
answer replaces the coarse one at the uncertain pixels alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveFloat, SerializeAsAny
from torch import Tensor

from mfuser import Inference, InferenceSpec, MFuserError, Network, component_of, hookimpl
from mfuser.model.sliding_window import (
    at_least_float32,
    check_window,
    checked_stride,
    default_stride,
    window_origins,
)
from mfuser.specs import ImageSize, Size
from mfuser_plugins.inference._resizing import resize, scaled, size_of


class CoarseToFine(Inference):
    """coarse: of the image at reduced size. Windows of the image itself follow where they are
    needed, and are averaged where they overlap."""

    def __init__(self, spec: CoarseToFineSpec) -> None:
        self.coarse = spec.coarse.build()
        self.scale, self.threshold, self.share = spec.scale, spec.threshold, spec.share
        self.stride = spec.stride

    def __call__(self, network: Network, images: Tensor) -> Tensor:
        size = size_of(images)
        small = resize(images, scaled(size, self.scale), antialias=True)
        coarse = resize(self.coarse(network, small), size)
        uncertain = network.confidence(coarse) <= self.threshold  # (B, H, W)
        fine, count = self._fine(network, images, coarse, uncertain)
        replaced = (uncertain & (count > 0)).unsqueeze(1)
        return (fine / count.clamp_min(1).unsqueeze(1)).where(replaced, coarse)

    def _fine(
        self, network: Network, images: Tensor, coarse: Tensor, uncertain: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of the scores (B, K, H, W) of the windows that hold enough uncertain pixels, each
        image's own, and how many there are at each pixel (B, H, W)."""
        window = network.window
        step = checked_stride(self.stride, window)
        fine = coarse.new_zeros(coarse.shape)
        count = coarse.new_zeros(uncertain.shape)
        for y in window_origins(images.shape[-2], window[0], step[0]):
            for x in window_origins(images.shape[-1], window[1], step[1]):
                place = (..., slice(y, y + window[0]), slice(x, x + window[1]))
                shares = uncertain[place].float().mean((-2, -1))
                chosen = [
                    i for i, share in enumerate(shares.tolist()) if share and share >= self.share
                ]
                if chosen:
                    scores = at_least_float32(network.scores(images[chosen][place]))
                    for i, one in zip(chosen, scores, strict=True):
                        fine[i][place] += one
                        count[i][place] += 1
        return fine, count

    def check(self, network: Network, size: Size) -> None:
        check_window(size, network.window)
        checked_stride(self.stride, network.window)
        try:
            self.coarse.check(network, scaled(size, self.scale))
        except MFuserError as error:
            raise MFuserError(f"at scale {self.scale:g}: {error}") from error


class CoarseToFineSpec(InferenceSpec, name="coarse_to_fine"):
    """A pass over the reduced image, then windows of the full one where that was uncertain.

    scale: of the coarse pass, a factor on the image's size.
    coarse: the inference of that pass.
    threshold: a pixel is uncertain where the probability of its class is not above this; 0: none
        is, 1: all are.
    share: the least share of uncertain pixels for which a window is segmented again.
    stride: of the windows in pixels; None: two thirds of the window.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"scale": 0.75, "threshold": 0.5}

    scale: PositiveFloat = Field(default=0.5, le=1)
    coarse: Annotated[SerializeAsAny[InferenceSpec], component_of("inference")] = Field(
        default="whole", validate_default=True
    )
    threshold: float = Field(default=0.9, ge=0, le=1)
    share: float = Field(default=0.05, ge=0, le=1)
    stride: ImageSize | None = None

    def build(self) -> CoarseToFine:
        return CoarseToFine(self)

    def resolved(self, window: Size) -> CoarseToFineSpec:
        return self.model_copy(
            update={
                "coarse": self.coarse.resolved(window),
                "stride": self.stride or default_stride(window),
            }
        )


@hookimpl
def mfuser_components() -> list[type[InferenceSpec]]:
    return [CoarseToFineSpec]
