"""transformers' further families: stepping equals the library's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import HF_TEXT, HF_VISION
from stepping import check_texts, perturb, step
from torch import Tensor

from mfuser import MFuserError

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

from mfuser_plugins.backbones.transformers import (
    HuggingFacePairSpec,
    HuggingFaceVisionSpec,
)

SIGLIP2 = {"num_patches": 16}
BIAS = {"use_relative_position_bias": True, "use_mean_pooling": False}
SHARED = {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True}
TYPES: list[tuple[str, dict[str, Any]]] = [
    ("vit_mae", {"mask_ratio": 0.75}),
    ("beit", BIAS),
    ("beit", SHARED),
    ("data2vec-vision", BIAS),
    ("data2vec-vision", SHARED),
    ("metaclip_2_vision_model", {}),
    ("siglip2_vision_model", SIGLIP2),
    ("aimv2_vision_model", {"is_native": True}),
    ("aimv2_vision_model", {}),
]


def vision(kind: str, config: dict[str, Any], size: tuple[int, int]) -> Any:
    torch.manual_seed(0)
    # The vision configurations of some pairs have no automatic model; the pair has.
    pairs = {"metaclip_2_vision_model": "metaclip_2", "aimv2_vision_model": "aimv2"}
    whole = {"model_type": kind, **HF_VISION, **config}
    if kind in pairs:
        inner = {k: v for k, v in whole.items() if k != "model_type"}
        whole = {"model_type": pairs[kind], "vision_config": inner, "text_config": HF_TEXT}
    backbone = HuggingFaceVisionSpec(model="random", config=whole).build(size)
    perturb(backbone)
    return backbone


def library(backbone: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs of every layer in the library's own forward, and its last state."""
    outputs: list[Any] = []
    hooks = [m.register_forward_hook(lambda _, __, out: outputs.append(out))
             for m in backbone.stepper.layers]  # fmt: skip
    model, kind = backbone.model, backbone.model.config.model_type
    if kind == "siglip2_vision_model":
        patches, shapes = backbone.stepper.flatten(images)
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        final = model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    elif kind == "aimv2_vision_model":
        final = model(images)
    else:
        options = {}
        if kind == "vit_mae":
            count = backbone.grid[0] * backbone.grid[1]
            options["noise"] = torch.arange(count).expand(len(images), -1).float()
        final = model(images, interpolate_pos_encoding=True, **options)
    for hook in hooks:
        hook.remove()
    last = final.last_hidden_state
    if kind == "metaclip_2_vision_model":  # there the norm sees the class token only
        last = model.post_layernorm(last)
    return [o[0] if isinstance(o, tuple) else o for o in outputs], last


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (80, 112)])
@pytest.mark.parametrize(("kind", "config"), TYPES)
def test_stepping_equals_the_library(
    kind: str, config: dict[str, Any], size: tuple[int, int]
) -> None:
    if kind == "aimv2_vision_model" and not config and size != (64, 64):
        with pytest.raises(MFuserError, match="positions for images of 64x64 only"):
            vision(kind, config, size)
        return
    backbone = vision(kind, config, size)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    tokens, finished = step(backbone, images)
    wanted, last = library(backbone, images)
    assert backbone.num_prefix_tokens == (0 if kind.startswith(("siglip2", "aimv2")) else 1)
    assert finished.shape == (2, backbone.token_shape.num_tokens, 64)
    assert len(wanted) == backbone.depth
    assert all(torch.equal(a, b) for a, b in zip(tokens, wanted, strict=True))
    assert torch.equal(finished, last)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["metaclip_2", "siglip2"])
def test_pairs_equal_the_library(kind: str) -> None:
    torch.manual_seed(0)
    config = {"model_type": kind, "vision_config": {**HF_VISION, **SIGLIP2}, "text_config": HF_TEXT}
    if kind == "metaclip_2":
        config["vision_config"] = HF_VISION
        config["projection_dim"] = 32
    backbone: Any = HuggingFacePairSpec(model="random", config=config).build((80, 112))
    perturb(backbone)
    images = torch.randn(2, 3, 80, 112, generator=torch.Generator().manual_seed(2))
    model = backbone.model
    pooled, dense = backbone.project(step(backbone, images)[1])
    if kind == "siglip2":
        patches, shapes = backbone.stepper.flatten(images)
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        wanted = model.get_image_features(patches, mask, shapes).pooler_output
        # Attention with a mask of ones and without: two kernels, rounding.
        torch.testing.assert_close(pooled[:, 0], wanted, rtol=1e-4, atol=1e-5)
    else:
        wanted = model.get_image_features(images, interpolate_pos_encoding=True).pooler_output
        assert torch.equal(pooled[:, 0], wanted)
    assert dense.shape == (2, 35, backbone.text_dim)
    check_texts(backbone)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(MFuserError, match="multiples of 16 pixels; 70x64 is not"):
        vision("beit", BIAS, (70, 64))
    backbone = vision("siglip2_vision_model", SIGLIP2, (70, 100))
    assert backbone.grid == (4, 6)
    with pytest.raises(MFuserError, match="flattened patches"):
        backbone.resize((64, 64), 8)
