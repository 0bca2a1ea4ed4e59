"""timm backbones: stepping equals the library's own forward, resizing equals its own resizing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import perturb
from torch import nn

from mfuser import MFuserError, WeightsError
from mfuser_plugins.backbones._timm import TimmBackbone
from mfuser_plugins.backbones.timm import TimmSpec

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL,
    "vit_small_patch14_dinov2": {**SMALL, "img_size": 224},  # layer scale
    "vit_small_patch14_reg4_dinov2": {**SMALL, "img_size": 224},  # registers, no class position
    "vit_base_patch16_clip_224": SMALL,  # norm before the blocks
    "vit_base_patch16_siglip_224": SMALL,  # no prefix tokens, attention pool
    "vit_mediumd_patch16_reg4_gap_256": SMALL,  # fc_norm
    "vit_intern300m_patch14_448": {**SMALL, "img_size": 224},  # no final norm, dynamic size
    "deit3_small_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,  # two prefix tokens
    "vitamin_small_224": {"depth": 2},  # convolutional stem
    "vit_tiny_r_s16_p8_224": SMALL,  # hybrid
    "eva02_tiny_patch14_224": SMALL,  # rotary and absolute positions, fc_norm
    "eva02_base_patch14_448": {**SMALL, "img_size": 224, "global_pool": "token"},
    "vit_small_patch16_dinov3": SMALL,  # dynamic size, registers
    "vit_small_patch16_rope_mixed_224": SMALL,  # one rotary table per block
    "vit_pe_spatial_tiny_patch16_512": {**SMALL, "img_size": 224},  # no final norm
    "beitv2_base_patch16_224": SMALL,  # bias per block, fc_norm
    "beit_base_patch16_224": {**SMALL, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
}


def build(model: str, size: tuple[int, int], **options: Any) -> TimmBackbone:
    torch.manual_seed(0)
    spec = TimmSpec(model=model, weights="random", **options)
    return spec.build(size)


@torch.no_grad()
def check_stepping(backbone: TimmBackbone) -> None:
    """Every block and the end against the library, bit for bit."""
    model: Any = backbone.model
    h, w = backbone.grid
    # What fills no patch is cut here and by the library's models of fixed size alike.
    images = torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(2))
    stream = backbone.embed(images)
    assert stream.grid == (h, w)
    assert stream.tokens.shape[1:] == (backbone.token_shape.num_tokens, backbone.embed_dim)
    final, wanted = model.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")
    tokens = stream.tokens
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, stream.state)
        spatial, prefix = wanted[i] if isinstance(wanted[i], tuple) else (wanted[i], None)
        assert torch.equal(tokens[:, backbone.num_prefix_tokens :], spatial), f"block {i}"
        if prefix is not None:
            assert torch.equal(tokens[:, : backbone.num_prefix_tokens], prefix)
    finished = backbone.finish(tokens, stream.state)
    assert finished.shape == tokens.shape
    # Where pooling is average the library's features are not normalized; the norm is fc_norm.
    assert torch.equal(finished, model.fc_norm(final))
    if not isinstance(model.norm, nn.Identity) or not isinstance(model.fc_norm, nn.Identity):
        assert not torch.equal(finished, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_stepping_equals_the_library(name: str) -> None:
    default = 256 if name.endswith("_256") else 224
    backbone = build(name, (default, default), options=MODELS[name])
    perturb(backbone.model)
    check_stepping(backbone)
    backbone.resize((272, 336) if backbone.patch_size == (16, 16) else (252, 308))
    check_stepping(backbone)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:timm.layers.interpolate")
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "beitv2_base_patch16_224",
        "vit_small_patch14_reg4_dinov2",
    ],
)
def test_resize_equals_the_librarys_own_where_the_convention_is_its_own(name: str) -> None:
    ours = build(name, (224, 224), options={**MODELS[name]}, antialias=True, patch_resample="pinv")
    torch.manual_seed(0)
    library = timm.create_model(name, num_classes=0, **MODELS[name])
    library.reset_classifier(0, "")
    library.load_state_dict(ours.model.state_dict())
    perturb(library)
    perturb(ours.model)
    ours.resize((160, 224), 8)
    library.set_input_size((160, 224), (8, 8))
    for key, value in library.state_dict().items():
        assert torch.equal(ours.model.state_dict()[key], value), key


def test_resize_starts_from_the_original_tables() -> None:
    options = MODELS["eva02_tiny_patch14_224"]
    once = build("eva02_tiny_patch14_224", (308, 280), options=options)
    often = build("eva02_tiny_patch14_224", (112, 56), options=options)
    often.resize((224, 448), 16)
    often.resize((308, 280), 14)
    state = often.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in once.model.state_dict().items())
    often.resize((224, 224))
    plain = build("eva02_tiny_patch14_224", (224, 224), options=options)
    state = often.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.model.state_dict().items())


def test_tables_that_were_loaded_or_trained_become_the_originals() -> None:
    options = MODELS["vit_tiny_patch16_224"]
    a = build("vit_tiny_patch16_224", (224, 224), options=options)
    b = build("vit_tiny_patch16_224", (224, 224), options=options)
    perturb(a)
    b.load_state_dict(a.state_dict())
    a.resize((320, 240))
    b.resize((320, 240))
    assert torch.equal(a.model.pos_embed, b.model.pos_embed)
    assert a.model.pos_embed.shape[1] == 20 * 15 + 1


@settings(max_examples=20, deadline=None)
@given(h=st.integers(14, 120), w=st.integers(14, 120))
def test_the_grid_is_the_floor_of_any_size(h: int, w: int) -> None:
    backbone = build("vit_small_patch14_dinov2", (h, w), options={**SMALL, "img_size": 56})
    assert backbone.grid == (h // 14, w // 14)
    images = torch.rand(1, 3, h, w)
    tokens = backbone.embed(images).tokens
    assert tokens.shape == (1, backbone.token_shape.num_tokens, 64)
    edge = images.clone()
    edge[:, :, h // 14 * 14 :], edge[..., w // 14 * 14 :] = 0, 0
    assert torch.equal(backbone.embed(edge).tokens, tokens)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_intern300m_patch14_448"])
def test_dynamic_models_drop_what_fills_no_patch(name: str) -> None:
    backbone = build(name, (100, 130), options=MODELS[name])
    assert backbone.grid == (100 // backbone.patch_size[0], 130 // backbone.patch_size[0])
    assert backbone.embed(torch.rand(1, 3, 100, 130)).tokens.shape[1] == (
        backbone.token_shape.num_tokens
    )


def test_antialias_and_kernel_conventions_differ() -> None:
    options = MODELS["vit_tiny_patch16_224"]
    tables = [
        build("vit_tiny_patch16_224", (320, 320), options=options, **how).model.pos_embed
        for how in ({}, {"antialias": True}, {"interpolation": "bilinear"})
    ]
    kernels = [
        build(
            "vit_tiny_patch16_224", (320, 320), options=options, patch_size=20, **how
        ).model.patch_embed.proj.weight
        for how in ({}, {"patch_resample": "pinv"}, {"patch_resample": "bilinear"})
    ]
    for variants in (tables, kernels):
        assert not torch.allclose(variants[0], variants[1], atol=1e-4)
        assert not torch.allclose(variants[0], variants[2], atol=1e-4)


def test_frozen_and_always_in_evaluation_mode() -> None:
    options = {**SMALL, "drop_path_rate": 0.5}
    frozen = build("vit_tiny_patch16_224", (64, 64), options=options)
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = build("vit_tiny_patch16_224", (64, 64), options=options, freeze=False)
    assert all(p.requires_grad for p in trained.parameters())
    trained.train()
    assert not any(m.training for m in trained.modules())
    trained.resize((96, 96), 8)
    assert all(p.requires_grad for p in trained.parameters())


def test_depth_keeps_the_first_blocks() -> None:
    whole = build("vit_tiny_patch16_224", (64, 64), options={**SMALL, "depth": 3})
    cut = build("vit_tiny_patch16_224", (64, 64), options={**SMALL, "depth": 3}, depth=2)
    assert cut.depth == 2
    images = torch.rand(1, 3, 64, 64)
    a, b = whole.embed(images).tokens, cut.embed(images).tokens
    for i in range(2):
        a, b = whole.block(i, a, None), cut.block(i, b, None)
    assert torch.equal(a, b)
    with pytest.raises(MFuserError, match="has 3 blocks"):
        build("vit_tiny_patch16_224", (64, 64), options={**SMALL, "depth": 3}, depth=4)


def test_state_round_trip_and_library_model_inside() -> None:
    a = build("beitv2_base_patch16_224", (96, 128), options=SMALL)
    perturb(a)
    b = build("beitv2_base_patch16_224", (96, 128), options=SMALL)
    assert all(key.startswith("model.") for key in a.state_dict())
    b.load_state_dict(a.state_dict())
    images = torch.rand(1, 3, 96, 128)
    stream, other = a.embed(images), b.embed(images)
    assert torch.equal(a.block(0, stream.tokens, stream.state), b.block(0, other.tokens, None))


def test_statistics_come_from_the_tag() -> None:
    imagenet = build("vit_small_patch14_dinov2", (56, 56), options=SMALL)
    half = build("vit_tiny_patch16_224", (64, 64), options=SMALL)
    own = build("vit_tiny_patch16_224", (64, 64), options=SMALL, mean=(0, 0, 0), std=(1, 1, 1))
    assert imagenet.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert half.std.flatten().tolist() == [0.5, 0.5, 0.5]
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(own.normalize(images), images)
    assert own.license is None


@pytest.mark.parametrize(("spec", "message"), [
    ({"model": "vit_smal_patch16_224"}, "did you mean 'vit_small_patch16_224'"),
    ({"model": "vit_tiny_patch16_224.nonsense"}, "no weights 'nonsense'"),
    ({"model": "vit_tiny_patch16_224.augreg_in21k", "weights": "dino"}, "leave one of the two out"),
    ({"model": "resnet18", "weights": "random"}, r"of class ResNet.*vit_\*"),
    ({"model": "vit_tiny_patch16_224", "weights": "random", "options": {"color": 1}}, "color"),
    ({"model": "vitamin_small_224", "weights": "random", "patch_size": 8,
      "options": {"depth": 1}}, "no single kernel"),
])  # fmt: skip
def test_mistakes_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(MFuserError, match=message):
        TimmSpec(**spec).build((224, 224))


def test_wrong_image_sizes_are_refused() -> None:
    backbone = build("vit_tiny_patch16_224", (64, 96), options=SMALL)
    with pytest.raises(MFuserError, match=r"\(B, 3, 64, 96\).*\(1, 3, 96, 64\)"):
        backbone.embed(torch.rand(1, 3, 96, 64))
    with pytest.raises(MFuserError, match="holds no patch"):
        backbone.resize((8, 96))


@pytest.mark.usefixtures("cache")
def test_missing_weights_say_how_to_get_them() -> None:
    with pytest.raises(WeightsError, match=r"hf download timm/vit_small_patch14_dinov2.lvd142m"):
        TimmSpec(model="vit_small_patch14_dinov2.lvd142m").build((224, 224))


@pytest.mark.parametrize(
    ("model", "source", "target", "prefix"),
    [
        ("vit_small_patch14_dinov2", "dino", "backbone.dinov2", 1),
        ("eva02_base_patch14_448", "visual", "backbone", 1),
    ],
)
def test_positions_are_resampled_as_in_the_released_models(
    model: str, source: str, target: str, prefix: int
) -> None:
    file = golden("pretrained_load")
    table = file[f"eva.src.{source}.pos_embed"]
    side = int((table.shape[1] - prefix) ** 0.5)
    options = {"depth": 1, "embed_dim": table.shape[2], "num_heads": 1, "img_size": side * 14}
    backbone = build(model, (side * 14, side * 14), options=options)
    with torch.no_grad():
        backbone.model.pos_embed.copy_(table)
        backbone.model.patch_embed.proj.weight.copy_(
            file[f"eva.src.{source}.patch_embed.proj.weight"]
        )
    backbone.resize((512, 512))
    state = backbone.model.state_dict()
    for name in ("pos_embed", "patch_embed.proj.weight"):
        # The same interpolation on another PyTorch: rounding only.
        torch.testing.assert_close(
            state[name], file[f"eva.dst.{target}.{name}"], rtol=1e-5, atol=2e-6
        )


@pytest.mark.real
def test_real_dinov2_weights(real: Path) -> None:
    from safetensors.torch import load_file

    file = real / "weights" / "dinov2_vits14.fp16.safetensors"
    spec = TimmSpec(model="vit_small_patch14_dinov2", weights=str(file))
    backbone = spec.build((518, 518))
    given, held = load_file(file), backbone.model.state_dict()
    assert given.keys() == held.keys()
    assert all(torch.equal(held[key], value.float()) for key, value in given.items())
    backbone.resize((224, 336))
    with torch.no_grad():
        # A bright and a dark half: features of the halves must fall apart, and not within one.
        images = torch.zeros(1, 3, 224, 336)
        images[..., 168:] = 0.8
        images += 0.05 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
        stream = backbone.embed(backbone.normalize(images))
        tokens = stream.tokens
        for i in range(10):
            tokens = backbone.block(i, tokens, stream.state)
        features = backbone.finish(tokens, None)[:, 1:].unflatten(1, backbone.grid)
        left, right = features[0, :, :10].flatten(0, 1), features[0, :, -10:].flatten(0, 1)

        def alike(a: torch.Tensor, b: torch.Tensor) -> float:
            unit = nn.functional.normalize
            return (unit(a, dim=-1) @ unit(b, dim=-1).T).mean().item()

        assert alike(left, left) > alike(left, right) + 0.1
        assert alike(right, right) > alike(left, right) + 0.1
