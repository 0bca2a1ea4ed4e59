"""A linear probe: one 1x1 convolution on the pyramid levels, concatenated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfuser import DecoderOutput, DecoderSpec, hookimpl
from mfuser_plugins.decoders._per_pixel import PerPixelDecoder, resized


class Linear(PerPixelDecoder):
    """Batch norm and one linear map on the concatenated levels, at the resolution of the finest.

    The linear evaluation of DINOv2's segmentation study (Oquab et al. 2023, section 7.4).
    """

    def __init__(self, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(sum(channels))
        self.classify = nn.Conv2d(sum(channels), num_classes, 1)

    def forward(self, pyramid: list[Tensor], queries: Tensor | None = None) -> DecoderOutput:
        size = (pyramid[0].shape[-2], pyramid[0].shape[-1])
        return DecoderOutput([self.classify(self.norm(torch.cat(resized(pyramid, size), 1)))])


class LinearSpec(DecoderSpec, name="linear"):
    """A linear probe on the feature pyramid, trained with cross-entropy. Takes no text."""

    def build(self, channels: tuple[int, ...], num_classes: int, text_dim: int | None) -> Linear:
        return Linear(channels, num_classes)


@hookimpl
def mfuser_components() -> list[type[DecoderSpec]]:
    return [LinearSpec]
