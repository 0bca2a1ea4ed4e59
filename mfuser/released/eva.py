"""Released MFuser, EVA02-CLIP-L with DINOv2-L -> timm's Eva inside open_clip."""

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
        "backbone.blocks.{i}.",
        "encoder.vlm.model.visual.trunk.blocks.{i}.",
        row("attn.q_bias", "attn.q_proj.bias"),
        row("attn.v_bias", "attn.v_proj.bias"),
        row("attn.inner_attn_ln.{rest}", "attn.norm.{rest}"),
        row("mlp.w1.{rest}", "mlp.fc1_g.{rest}"),  # the gate
        row("mlp.w2.{rest}", "mlp.fc1_x.{rest}"),
        row("mlp.w3.{rest}", "mlp.fc2.{rest}"),
        row("mlp.ffn_ln.{rest}", "mlp.norm.{rest}"),
        row("{rest}", "{rest}"),  # norm1, norm2, attn.{q,k,v}_proj.weight, attn.proj
    ),
    *under(
        "backbone.",
        "encoder.vlm.model.visual.trunk.",
        row("cls_token", "cls_token"),
        row("pos_embed", "pos_embed"),
        row("patch_embed.{rest}", "patch_embed.{rest}"),
        row("norm.{rest}", "norm.{rest}"),
        row("head.{rest}", "head.{rest}"),
    ),
    row("text_encoder.{rest}", "encoder.vlm.model.text.{rest}"),
)

ROPE = "rotary table, computed from the grid"

FORMAT = Format(
    name="eva",
    title="a released MFuser with EVA02-CLIP and DINOv2",
    marks=(
        "backbone.blocks.0.attn.q_bias",
        "backbone.dinov2.cls_token",
        "decode_head.query_embed.weight",
    ),
    rows=(*TOWER, *DINOV2, *ADAPTERS, *ENHANCER, *PYRAMID_AND_DECODER),
    unused={
        **UNUSED,
        "random_text": "never read by the released model",
        "backbone.rope.{rest}": ROPE,
        "backbone.blocks.{i}.attn.rope.{rest}": ROPE,
    },
    kept=SOFTMAX_KEPT,
)
