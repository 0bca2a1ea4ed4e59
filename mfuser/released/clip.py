"""Released MFuser, CLIP ViT-L with DINOv2-L -> open_clip, which keeps OpenAI's names."""

from __future__ import annotations

from mfuser.released.shared import (
    ADAPTERS,
    DINOV2,
    ENHANCER,
    PYRAMID_AND_DECODER,
    SOFTMAX_KEPT,
    UNUSED,
)
from mfuser.released.translate import Format, Row, row, under

TOWER: tuple[Row, ...] = (
    *under(
        "backbone.",
        "encoder.vlm.model.visual.",
        row("class_embedding", "class_embedding"),
        row("positional_embedding", "positional_embedding"),
        row("proj", "proj"),
        row("conv1.weight", "conv1.weight"),
        row("ln_pre.{rest}", "ln_pre.{rest}"),
        row("ln_post.{rest}", "ln_post.{rest}"),
        row("transformer.{rest}", "transformer.{rest}"),
    ),
    row("text_encoder.{rest}", "encoder.vlm.model.{rest}"),
)

# Linear maps around each adapter, VFM's width -> VLM's and back, and one at the end.
MAPS: tuple[Row, ...] = (
    row("backbone.adapter_proj1.{i}.{rest}", "encoder.adapters.{i}.vfm_in.{rest}"),
    row("backbone.adapter_proj2.{i}.{rest}", "encoder.adapters.{i}.vfm_out.{rest}"),
    row("backbone.adapter_proj3.{rest}", "encoder.project_vfm.{rest}"),
)

FORMAT = Format(
    name="clip",
    title="a released MFuser with CLIP and DINOv2",
    marks=(
        "backbone.class_embedding",
        "backbone.dinov2.cls_token",
        "decode_head.query_embed.weight",
    ),
    rows=(*TOWER, *MAPS, *DINOV2, *ADAPTERS, *ENHANCER, *PYRAMID_AND_DECODER),
    unused=UNUSED,
    kept=SOFTMAX_KEPT,
)
