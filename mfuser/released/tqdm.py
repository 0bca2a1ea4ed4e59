"""tqdm (Pak et al., ECCV 2024): the same decoder on one vision-language tower, no DINOv2."""

from __future__ import annotations

from mfuser.released import clip, eva
from mfuser.released.shared import PYRAMID_AND_DECODER, SOFTMAX_KEPT
from mfuser.released.translate import Format

ABSENT = ("backbone.dinov2.", "backbone.adapter", "context_decoder.")

FORMATS = (
    Format(
        name="tqdm-eva",
        title="a released tqdm with EVA02-CLIP",
        marks=("backbone.blocks.0.attn.q_bias", "decode_head.query_embed.weight", "contexts"),
        unmarked=ABSENT,
        rows=(*eva.TOWER, *PYRAMID_AND_DECODER),
        unused={
            "random_text": eva.FORMAT.unused["random_text"],
            "backbone.rope.{rest}": eva.ROPE,
            "backbone.blocks.{i}.attn.rope.{rest}": eva.ROPE,
        },
        kept=SOFTMAX_KEPT,
    ),
    Format(
        name="tqdm-clip",
        title="a released tqdm with CLIP",
        marks=("backbone.class_embedding", "decode_head.query_embed.weight", "contexts"),
        unmarked=ABSENT,
        rows=(*clip.TOWER, *PYRAMID_AND_DECODER),
        kept=SOFTMAX_KEPT,
    ),
)
