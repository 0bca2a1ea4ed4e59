"""Released MFuser, SigLIP-L with DINOv2-L, in transformers' names -> timm's and open_clip's."""

from __future__ import annotations

import math

from mfuser.released.shared import (
    ADAPTERS,
    COUNTER,
    DINOV2,
    ENHANCER,
    LOGIT_BIAS,
    LOGIT_SCALE,
    PYRAMID_AND_DECODER,
    UNUSED,
)
from mfuser.released.translate import Format, Row, row, under

QKV = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")

TOWER: tuple[Row, ...] = (
    *under(
        "backbone.encoder.layers.{i}.",
        "encoder.vlm.model.visual.trunk.blocks.{i}.",
        row([q + "weight" for q in QKV], "attn.qkv.weight", "stacked"),
        row([q + "bias" for q in QKV], "attn.qkv.bias", "stacked"),
        row("self_attn.out_proj.{rest}", "attn.proj.{rest}"),
        row("layer_norm1.{rest}", "norm1.{rest}"),
        row("layer_norm2.{rest}", "norm2.{rest}"),
        row("mlp.{rest}", "mlp.{rest}"),
    ),
    *under(
        "backbone.",
        "encoder.vlm.model.visual.trunk.",
        row("embeddings.patch_embedding.{rest}", "patch_embed.proj.{rest}"),
        row("embeddings.position_embedding.weight", "pos_embed", "with a leading axis of 1"),
        row("post_layernorm.{rest}", "norm.{rest}"),
    ),
    *under(
        "backbone.head.",
        "encoder.vlm.model.visual.trunk.attn_pool.",
        row("probe", "latent"),
        row("attention.in_proj_weight", ["q.weight", "kv.weight"], "first third, the rest"),
        row("attention.in_proj_bias", ["q.bias", "kv.bias"], "first third, the rest"),
        row("attention.out_proj.{rest}", "proj.{rest}"),
        row("layernorm.{rest}", "norm.{rest}"),
        row("mlp.{rest}", "mlp.{rest}"),
    ),
)

TEXT: tuple[Row, ...] = (
    *under(
        "text_encoder.encoder.layers.{i}.",
        "encoder.vlm.model.text.transformer.resblocks.{i}.",
        row([q + "weight" for q in QKV], "attn.in_proj_weight", "stacked"),
        row([q + "bias" for q in QKV], "attn.in_proj_bias", "stacked"),
        row("self_attn.out_proj.{rest}", "attn.out_proj.{rest}"),
        row("layer_norm1.{rest}", "ln_1.{rest}"),
        row("layer_norm2.{rest}", "ln_2.{rest}"),
        row("mlp.fc1.{rest}", "mlp.c_fc.{rest}"),
        row("mlp.fc2.{rest}", "mlp.c_proj.{rest}"),
    ),
    *under(
        "text_encoder.",
        "encoder.vlm.model.text.",
        row("embeddings.token_embedding.weight", "token_embedding.weight"),
        row("embeddings.position_embedding.weight", "positional_embedding"),
        row("final_layer_norm.{rest}", "ln_final.{rest}"),
        row("head.{rest}", "text_projection.{rest}"),
    ),
)

INDEX = "numbers the positions"
SCALE = "not in the file; set alignment.logit_scale and alignment.logit_bias to train on"

FORMAT = Format(
    name="siglip",
    title="a released MFuser with SigLIP and DINOv2",
    marks=(
        "backbone.embeddings.patch_embedding.weight",
        "backbone.dinov2.cls_token",
        "decode_head.query_embed.weight",
    ),
    rows=(*TOWER, *TEXT, *DINOV2, *ADAPTERS, *ENHANCER, *PYRAMID_AND_DECODER),
    unused={
        **UNUSED,
        "backbone.adapter_proj{rest}": "a linear map that the released SigLIP model never calls",
        "backbone.embeddings.position_ids": INDEX,
        "text_encoder.embeddings.position_ids": INDEX,
    },
    # open_clip starts SigLIP's contrastive scale and bias there.
    kept={**COUNTER, LOGIT_SCALE: (math.log(10), SCALE), LOGIT_BIAS: (-10.0, SCALE)},
)
