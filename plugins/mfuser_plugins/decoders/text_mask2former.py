"""A Mask2Former whose queries are the class texts (tqdm, ECCV 2024; paper, section 5.1)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mfuser import DecoderOutput, DecoderSpec, MFuserError, hookimpl
from mfuser_plugins.decoders._mask_decoder import MaskDecoder, MaskDecoderSpec, deep_names
from mfuser_plugins.decoders._mask_losses import class_masks
from mfuser_plugins.decoders._pixel_decoder import Init


class TextMask2Former(MaskDecoder):
    """Query k is the text of class k, and answers for class k: no Hungarian matching."""

    def __init__(
        self,
        spec: TextMask2FormerSpec,
        channels: tuple[int, ...],
        num_classes: int,
        text_dim: int,
    ) -> None:
        super().__init__(spec, channels, num_classes, text_dim, queries=num_classes)

    def forward(self, pyramid: list[Tensor], queries: Tensor | None = None) -> DecoderOutput:
        if queries is None:
            raise MFuserError("text_mask2former takes class queries from text, and got none")
        return self.decode(self.text_proj(queries), pyramid, queries)

    def loss(
        self, output: DecoderOutput, labels: Tensor, points: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses: `loss_*` of the last prediction, `d<i>.loss_*` of the i-th.

        points: for each prediction (n, P, 2), (x, y) in [0, 1], with n the number of class masks
        in the batch; None draws them.
        """
        there = class_masks(labels, self.num_classes)
        each = [
            self.losses(masks, classes, there, points[i] if points else None)
            for i, (masks, classes) in enumerate(zip(output.masks, output.classes, strict=True))
        ]
        return deep_names(self.losses.in_whole_batch(each, there, output.classes[-1].shape[1]))


class TextMask2FormerSpec(MaskDecoderSpec, name="text_mask2former"):
    """A Mask2Former whose queries are the class texts, with fixed matching.

    width, heads: of both transformers; points: samples per head and level of the deformable
        attention.
    pixel_layers, pixel_ffn: of the pixel decoder; layers, ffn: of the query decoder.
    norm_groups: of the group norms; they divide the width.
    init: how the pixel decoder's convolutions start. "released": Kaiming-normal weights (fan out)
        and zero biases, as mmcv's ConvModule draws them; "pytorch": PyTorch's own.
    num_points, oversample, importance: masks are compared at this many points each; of
        oversample times as many, the most uncertain are kept as this share of them.
    cls_weight, mask_weight, dice_weight: of the three losses; no_object: of a query whose class
        is not there.
    """

    needs_text: ClassVar[bool] = True

    init: Init = "released"

    def build(
        self, channels: tuple[int, ...], num_classes: int, text_dim: int | None
    ) -> TextMask2Former:
        assert text_dim is not None, "a pairing without text is refused"
        return TextMask2Former(self, channels, num_classes, text_dim)


@hookimpl
def mfuser_components() -> list[type[DecoderSpec]]:
    return [TextMask2FormerSpec]
