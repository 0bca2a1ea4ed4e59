"""Test-time augmentation: the image at several scales, and mirrored.

As in mmsegmentation, whose default scales these are. There the averages are of softmax
probabilities; here, as in the sliding window, of the decoder's own scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveFloat, SerializeAsAny, field_validator
from torch import Tensor

from mfuser import Inference, InferenceSpec, MFuserError, Network, component_of, hookimpl
from mfuser.specs import Size
from mfuser_plugins.inference._resizing import resize, scaled, size_of


class MultiScaleFlip(Inference):
    """The average of another inference's scores over scales and mirror images."""

    def __init__(self, inner: Inference, scales: tuple[float, ...], flip: bool) -> None:
        self.inner, self.scales, self.flip = inner, scales, flip

    def __call__(self, network: Network, images: Tensor) -> Tensor:
        size = size_of(images)
        total: Tensor | None = None
        count = 0
        for scale in self.scales:
            given = resize(images, scaled(size, scale), antialias=True)
            for scores in self._both(network, given):
                at_size = resize(scores, size)
                total = at_size if total is None else total + at_size
                count += 1
        assert total is not None
        return total / count

    def _both(self, network: Network, images: Tensor) -> Iterator[Tensor]:
        """Scores of the image, and those of its mirror image mirrored back."""
        yield self.inner(network, images)
        if self.flip:
            yield self.inner(network, images.flip(-1)).flip(-1)

    def check(self, network: Network, size: Size) -> None:
        for scale in self.scales:
            try:
                self.inner.check(network, scaled(size, scale))
            except MFuserError as error:
                raise MFuserError(
                    f"at scale {scale:g}: {error}; or leave that scale out, or wrap another inner "
                    'inference, e.g. "whole"'
                ) from error


class MultiScaleFlipSpec(InferenceSpec, name="multi_scale_flip"):
    """Another inference at several scales and on the mirror image; the scores are averaged.

    scales: factors on the image's size.
    flip: also the mirror image at each scale.
    inner: the inference that is asked each time.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"scales": [1.0, 1.5]}

    scales: tuple[PositiveFloat, ...] = Field(
        default=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), min_length=1
    )
    flip: bool = True
    inner: Annotated[SerializeAsAny[InferenceSpec], component_of("inference")] = Field(
        default="sliding", validate_default=True
    )

    @field_validator("scales")
    @classmethod
    def _once(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scales)) != len(scales):
            raise ValueError(f"scales = {list(scales)}: a scale is given twice")
        return scales

    def build(self) -> MultiScaleFlip:
        return MultiScaleFlip(self.inner.build(), self.scales, self.flip)

    def resolved(self, window: Size) -> MultiScaleFlipSpec:
        return self.model_copy(update={"inner": self.inner.resolved(window)})


@hookimpl
def mfuser_components() -> list[type[InferenceSpec]]:
    return [MultiScaleFlipSpec]
