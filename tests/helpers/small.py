"""Options at which components are small, for the tests of several."""

from __future__ import annotations

from typing import Any

from mfuser_plugins.backbones.open_clip import OpenClipSpec


def clip(width: int = 48) -> dict[str, Any]:
    """A vision-language model with random weights. width: of its image tower."""
    options = OpenClipSpec.tiny["options"]
    vision = {**options["vision_cfg"], "width": width}
    return {
        **{"name": "open_clip", **OpenClipSpec.tiny},
        "options": {**options, "vision_cfg": vision},
    }


MASK_DECODER: dict[str, Any] = {
    "width": 16,
    "heads": 2,
    "points": 2,
    "pixel_layers": 1,
    "pixel_ffn": 16,
    "layers": 3,
    "ffn": 16,
    "norm_groups": 4,
    "num_points": 32,
}

HF_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}

HF_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 49408,
    "max_position_embeddings": 16,
    "eos_token_id": 49407,
    "bos_token_id": 49406,
    "projection_size": 64,
}
