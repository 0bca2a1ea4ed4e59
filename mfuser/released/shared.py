"""Rows that the released formats have in common: DINOv2, adapters, pyramid, prompt, decoder."""

from __future__ import annotations

import math

from mfuser.released.translate import Row, row

PYRAMID_AND_DECODER: tuple[Row, ...] = (
    row("contexts", "prompt.contexts", "without its leading axis of 1"),
    row("backbone.fpn1.{rest}", "pyramid.fpn1.{rest}"),
    row("backbone.fpn2.{rest}", "pyramid.fpn2.{rest}"),
    row("decode_head.{rest}", "decoder.{rest}"),
)

ENHANCER: tuple[Row, ...] = (
    row("gamma", "enhancer.gamma"),
    row("context_decoder.{rest}", "enhancer.{rest}"),
)

DINOV2: tuple[Row, ...] = (row("backbone.dinov2.{rest}", "encoder.vfm.model.{rest}"),)

ADAPTERS: tuple[Row, ...] = (
    row("backbone.adapter.{i}.{rest}", "encoder.adapters.{i}.mvfuser.{rest}"),
)

MASK_TOKEN = "stands for masked patches in DINOv2's pretraining"

UNUSED = {"backbone.dinov2.mask_token": MASK_TOKEN}

LOGIT_SCALE = "encoder.vlm.model.logit_scale"
LOGIT_BIAS = "encoder.vlm.model.logit_bias"

COUNTER = {"pyramid.fpn1.1.num_batches_tracked": (0.0, "not in the file; nothing reads it")}

SOFTMAX_KEPT = {
    **COUNTER,
    LOGIT_SCALE: (
        math.log(1 / 0.07),
        "not in the file, and not read: the alignment has its own temperature",
    ),
}
