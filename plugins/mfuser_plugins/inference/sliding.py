"""A window of the training size slides over the image; what the released models are tested with."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from mfuser import InferenceSpec, hookimpl
from mfuser.model.sliding_window import Sliding, default_stride
from mfuser.specs import ImageSize, Size


class SlidingSpec(InferenceSpec, name="sliding"):
    """A window of the training size slides over the image; overlapping scores are averaged.

    What is used where no inference is named.

    stride: of the window in pixels, one number or [height, width]; None: two thirds of the window,
        as released.
    window_batch: windows that go through the model at once; "auto": as many as a GPU has memory for
        once the first is measured; elsewhere one, or a few where they are small.
    """

    stride: ImageSize | None = None
    window_batch: PositiveInt | Literal["auto"] = "auto"

    def build(self) -> Sliding:
        return Sliding(self.stride, self.window_batch)

    def resolved(self, window: Size) -> SlidingSpec:
        return self.model_copy(update={"stride": self.stride or default_stride(window)})


@hookimpl
def mfuser_components() -> list[type[InferenceSpec]]:
    return [SlidingSpec]
