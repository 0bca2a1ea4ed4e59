"""timm's further families: stepping equals the library's own forward, at its size and at others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from stepping import perturb
from torch import Tensor, nn

from mfuser import MFuserError
from mfuser_plugins.backbones._timm import TimmBackbone
from mfuser_plugins.backbones.timm import TimmSpec

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4}
GEMMA = {**SMALL, "head_dim": 16}
SWIN = {"depths": (1, 1, 3, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)}
CONV = {"depths": (1, 1, 3, 1), "dims": (16, 32, 64, 128)}
HIERA = {"embed_dim": 32, "stages": (1, 1, 3, 1)}
SAM = {**SMALL, "global_attn_indexes": (1,), "img_size": 224, "window_size": 5}
MODELS: dict[str, dict[str, Any]] = {
    "vit_relpos_small_patch16_224": SMALL,  # bias per block, fc_norm
    "vit_srelpos_small_patch16_224": SMALL,  # shared bias
    "vit_relpos_base_patch16_cls_224": SMALL,  # class token
    "samvit_base_patch16": SAM,  # windows that do not divide the grid, one global block
    "samvit_base_patch16_224": SAM,  # no absolute positions
    "naflexvit_base_patch16_gap": SMALL,
    "naflexvit_so400m_patch16_radio_v4": SMALL,  # ten prefix tokens
    "cait_xxs24_224": SMALL,
    "xcit_nano_12_p16_224": SMALL,
    "xcit_nano_12_p8_224": SMALL,
    "qwen3_vit_88m": SMALL,
    "qwen3_vit_88m_merge": SMALL,
    "qwen3_vit_88m_enc": SMALL,
    "deepseek_vit_412m": {**SMALL, "patch_size": 16},
    "gemma4_vit_167m": GEMMA,
    "gemma4_vit_167m_enc": GEMMA,
    "swin_tiny_patch4_window7_224": SWIN,
    "swin_s3_tiny_224": SWIN,  # another window in the longest stage
    "swinv2_tiny_window8_256": {**SWIN, "img_size": 224},
    "swinv2_cr_tiny_ns_224": {**SWIN, "window_size": 7},
    "convnext_tiny": CONV,
    "convnextv2_nano": CONV,
    "convnext_nano_ols": CONV,  # overlapping stem
    "hiera_tiny_224": HIERA,
    "hiera_small_abswin_256": {**HIERA, "img_size": 224},
}
PREFIX = {
    "vit_relpos_base_patch16_cls_224": 1,
    "naflexvit_base_patch16_gap": 4,
    "naflexvit_so400m_patch16_radio_v4": 10,
}
# Another layout in memory (ConvNeXt), another order of the keys in attention (Hiera): rounding.
INEXACT = {"rtol": 1e-5, "atol": 1e-5}


def build(name: str, size: tuple[int, int], **options: Any) -> TimmBackbone:
    torch.manual_seed(0)
    options = {"options": MODELS[name], "weights": "random", **options}
    return TimmSpec(model=name, **options).build(size)


def images_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))


def recorded(model: Any, blocks: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs of every block in the library's own forward, and its result."""
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in blocks]
    final = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return outputs, final


def as_tokens(name: str, maps: Tensor) -> Tensor:
    """(B, D, h, w) or (B, h, w, D) -> (B, h·w, D)."""
    if maps.dim() == 3:
        return maps
    return maps.flatten(2).transpose(1, 2) if "convnext" in name else maps.flatten(1, 2)


@torch.no_grad()
def check_stepping(name: str, backbone: TimmBackbone) -> None:
    images, model = images_of(backbone.image_size), backbone.model
    wanted, final = recorded(model, backbone.stepper.blocks, images)
    stream = backbone.embed(images)
    assert stream.tokens.shape[1:] == (backbone.token_shape.num_tokens, backbone.embed_dim)
    tokens = stream.tokens
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, stream.state)
        output = wanted[i]
        if name.startswith("hiera"):
            output = model.reroll(output, backbone.stepper.opening + 1 + i)  # type: ignore
        if name.startswith(("hiera", "convnext")):
            torch.testing.assert_close(tokens, as_tokens(name, output), **INEXACT)
        else:
            assert torch.equal(tokens, as_tokens(name, output)), f"block {i}"
    finished = backbone.finish(tokens, stream.state)
    assert finished.shape == tokens.shape
    if name.startswith(("cait", "xcit", "deepseek", "vit_srelpos")):
        assert torch.equal(finished, final.view(finished.shape))
        assert not torch.equal(finished, tokens)
    elif isinstance(getattr(model, "fc_norm", None), nn.LayerNorm):
        assert torch.equal(finished, model.fc_norm(tokens))  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_stepping_equals_the_library(name: str) -> None:
    backbone = build(name, (224, 224))
    perturb(backbone.model)
    assert backbone.num_prefix_tokens == PREFIX.get(name, 0)
    check_stepping(name, backbone)
    backbone.resize((256, 320))
    check_stepping(name, backbone)
    assert backbone.grid == (256 // backbone.patch_size[0], 320 // backbone.patch_size[1])
    assert not any(m.training for m in backbone.modules())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "name",
    ["cait_xxs24_224", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_ns_224", "hiera_tiny_224"],
)
def test_resized_equals_a_model_built_at_that_size(name: str) -> None:
    """With the tables that we resampled; windows stay as they are."""
    backbone = build(name, (224, 224))
    perturb(backbone.model)
    backbone.resize((256, 320))
    library = timm.create_model(name, **{**MODELS[name], "img_size": (256, 320)}).eval()
    extra = library.load_state_dict(backbone.model.state_dict(), strict=False).unexpected_keys
    assert not extra
    images = images_of((256, 320))
    blocks = [library.get_submodule(n) for n, m in backbone.model.named_modules()
              if any(m is b for b in backbone.stepper.blocks)]  # fmt: skip
    assert len(blocks) == backbone.depth
    ours = recorded(backbone.model, backbone.stepper.blocks, images)[0]
    theirs = recorded(library, blocks, images)[0]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_nano_ols",
                                  "convnext_tiny", "xcit_nano_12_p16_224", "cait_xxs24_224",
                                  "naflexvit_base_patch16_gap", "samvit_base_patch16"])  # fmt: skip
@torch.no_grad()
def test_sizes_that_fill_no_patch_have_the_grid_they_say(name: str) -> None:
    backbone = build(name, (203, 230))
    stream = backbone.embed(images_of((203, 230)))
    assert stream.grid == backbone.grid
    assert stream.tokens.shape[1] == backbone.token_shape.num_tokens
    assert backbone.block(0, stream.tokens, stream.state).shape == stream.tokens.shape


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in MODELS if not n.endswith(("_enc", "_merge"))])
def test_files_of_the_whole_model_are_loaded(name: str, tmp_path: Path) -> None:
    library = timm.create_model(name, num_classes=7, **MODELS[name])
    perturb(library)
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in library.state_dict().items()}, path)
    loaded = build(name, (224, 224), weights=str(path))
    state = loaded.model.state_dict()
    whole = library.state_dict()
    prefix = "encoder." if any(k.startswith("encoder.") for k in whole) else ""
    assert any("blocks" in k for k in state)
    for key, value in state.items():
        assert torch.equal(value, whole[prefix + key]), key


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "hiera_tiny_224",
                                  "convnext_tiny", "cait_xxs24_224", "qwen3_vit_88m"])  # fmt: skip
def test_depth_keeps_the_first_blocks(name: str) -> None:
    whole, cut = build(name, (224, 224)), build(name, (224, 224), depth=1)
    assert cut.depth == 1 < whole.depth
    images = images_of((224, 224))
    a, b = whole.embed(images), cut.embed(images)
    assert torch.equal(whole.block(0, a.tokens, a.state), cut.block(0, b.tokens, b.state))
    with pytest.raises(MFuserError, match=f"has {whole.depth} blocks"):
        build(name, (224, 224), depth=9)


def test_resize_starts_from_the_original_tables() -> None:
    for name in ("cait_xxs24_224", "hiera_tiny_224", "samvit_base_patch16"):
        once, often = build(name, (256, 320)), build(name, (96, 64))
        often.resize((448, 224))
        often.resize((256, 320))
        state = often.model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in once.model.state_dict().items()), name


def test_mistakes_are_named() -> None:
    with pytest.raises(MFuserError, match="multiples of 32 pixels; 240x224 is not"):
        build("hiera_tiny_224", (240, 224))
    with pytest.raises(MFuserError, match="no single kernel"):
        build("swin_tiny_patch4_window7_224", (224, 224), patch_size=8)
    with pytest.raises(MFuserError, match="of class ConVit.*swin"):
        TimmSpec(model="convit_tiny", weights="random").build((224, 224))


def test_the_license_of_a_tag_is_known_without_its_weights() -> None:
    spec = {"weights": "random", "options": HIERA}
    assert TimmSpec(model="hiera_tiny_224.mae", **spec).build((224, 224)).license == "cc-by-nc-4.0"
    assert TimmSpec(model="hiera_tiny_224", **spec).build((224, 224)).license is None
