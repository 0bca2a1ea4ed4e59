"""Tokens that join a tower's own in its blocks: which families take them, and how it is seen."""

from __future__ import annotations

from typing import Any

import pytest
from small import clip

from mfuser import load_registry
from mfuser.testing.bench import BackboneBench
from mfuser.testing.kinds import further_tokens
from mfuser.testing.verdict import NotTried

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FACE = {"patch_size": 16, "image_size": 64, **HIDDEN}


def of_timm(model: str, **options: Any) -> dict[str, Any]:
    options = options or SMALL
    return {"name": "timm", "model": model, "weights": "random", "options": options}


def of_transformers(kind: str, **options: Any) -> dict[str, Any]:
    config = {"model_type": kind, **FACE, **options}
    return {"name": "transformers", "model": "random", "config": config}


CLIP = clip(32)


@pytest.mark.parametrize(
    "table",
    [
        of_timm("vit_small_patch14_reg4_dinov2"),
        of_timm("eva02_tiny_patch14_224"),
        of_timm("vit_small_patch16_dinov3"),
        of_timm("vit_small_patch16_rope_mixed_224"),
        of_timm("vit_base_patch16_siglip_224"),
        of_timm("deit_tiny_distilled_patch16_224"),
        of_transformers("dinov2", mlp_ratio=2),
        of_transformers("dinov3_vit", intermediate_size=64),
        of_transformers("siglip_vision_model", intermediate_size=64),
        of_transformers("dinov2", mlp_ratio=2, attn_implementation="eager"),
        CLIP,
    ],
    ids=lambda table: str(
        table.get("config", table)["model_type" if "config" in table else "model"]
    ),
)
def test_they_see_what_they_are_shown(table: dict[str, Any]) -> None:
    kinds = "vision_language" if table["name"] == "open_clip" else "vision"
    spec = load_registry().component(kinds, table, "here")
    assert "they see what they are shown" in further_tokens(BackboneBench(spec))


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (of_timm("vit_relpos_small_patch16_224"), "a fixed number of tokens"),
        (of_timm("xcit_nano_12_p16_224", embed_dim=32, depth=2, num_heads=2), "own tokens alone"),
        (of_timm("swin_tiny_patch4_window7_224", embed_dim=16), "within windows"),
        (of_transformers("beit", intermediate_size=64), "a fixed number of tokens"),
    ],
)
def test_those_that_take_none_say_why(table: dict[str, Any], reason: str) -> None:
    spec = load_registry().component("vision", table, "here")
    with pytest.raises(NotTried, match=reason):
        further_tokens(BackboneBench(spec))
