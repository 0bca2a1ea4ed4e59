"""Segmentation by the similarity of pixels and class texts alone (MaskCLIP)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveFloat
from torch import Tensor

from mfuser import DecoderOutput, DecoderSpec, MFuserError, hookimpl
from mfuser_plugins.decoders._per_pixel import PerPixelDecoder


class TextSimilarity(PerPixelDecoder):
    """The alignment map, cosine similarities of the dense visual embedding and the class texts,
    over a temperature.

    As MaskCLIP (Zhou et al., ECCV 2022, arXiv 2112.01071, section 3.2) reads a vision-language
    model's own dense embedding. It has no parameters and does not read the pyramid: its
    cross-entropy and the model's alignment loss train the components before it.
    """

    reads_alignment: ClassVar[bool] = True
    open_vocabulary: ClassVar[bool] = True

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        pyramid: list[Tensor],
        queries: Tensor | None = None,
        alignment: Tensor | None = None,
    ) -> DecoderOutput:
        """alignment: (B, K, h, w), cosine similarities."""
        if alignment is None:
            raise MFuserError("text_similarity reads the alignment map, and got none")
        return DecoderOutput([alignment / self.temperature])


class TextSimilaritySpec(DecoderSpec, name="text_similarity"):
    """Pixels go to the class whose text they are most similar to: the alignment map alone.

    temperature: of the softmax over classes.
    """

    needs_text: ClassVar[bool] = True

    temperature: PositiveFloat = 0.07

    def build(
        self, channels: tuple[int, ...], num_classes: int, text_dim: int | None
    ) -> TextSimilarity:
        return TextSimilarity(self.temperature)


@hookimpl
def mfuser_components() -> list[type[DecoderSpec]]:
    return [TextSimilaritySpec]
