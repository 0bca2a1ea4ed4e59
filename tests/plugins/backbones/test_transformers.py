"""transformers backbones: stepping equals the library's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import HF_TEXT, HF_VISION
from stepping import check_texts, perturb, step
from torch import nn

from mfuser import MFuserError, WeightsError

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

from mfuser_plugins.backbones.transformers import (  # noqa: E402
    HuggingFacePairSpec,
    HuggingFaceVisionSpec,
)

TYPES = {
    "dinov2": {}, "dinov2_with_registers": {"num_register_tokens": 3},
    "dinov3_vit": {"num_register_tokens": 4}, "vit": {}, "vit_msn": {}, "deit": {}, "ijepa": {},
    "clip_vision_model": {}, "siglip_vision_model": {},
}  # fmt: skip
PREFIX = {"dinov2_with_registers": 4, "dinov3_vit": 5, "deit": 2, "ijepa": 0,
          "siglip_vision_model": 0}  # fmt: skip


def vision(kind: str, size: tuple[int, int], **options: Any) -> Any:
    torch.manual_seed(0)
    config = {**HF_VISION, "model_type": kind, **TYPES.get(kind, {})}
    backbone = HuggingFaceVisionSpec(model="random", config=config, **options).build(size)
    perturb(backbone)
    return backbone


def pair(kind: str, size: tuple[int, int] = (80, 112), **options: Any) -> Any:
    torch.manual_seed(0)
    config = {"model_type": kind, "vision_config": HF_VISION, "text_config": HF_TEXT}
    if kind == "clip":
        config["projection_dim"] = 32
    backbone = HuggingFacePairSpec(model="random", config=config, **options).build(size)
    perturb(backbone)
    return backbone


@torch.no_grad()
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("size", "patch"), [((64, 64), None), ((80, 118), None), ((70, 112), 14)])
def test_stepping_equals_the_library(kind: str, size: tuple[int, int], patch: int | None) -> None:
    backbone = vision(kind, size, patch_size=patch)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    options = {"interpolate_pos_encoding": True} if backbone.stepper.layout.interpolate else {}
    wanted = backbone.model(images, output_hidden_states=True, **options)
    tokens, finished = step(backbone, images)
    assert backbone.num_prefix_tokens == PREFIX.get(kind, 1)
    assert finished.shape == (2, backbone.token_shape.num_tokens, 64)
    # transformers reports the input of the first block, then every block.
    for ours, theirs in zip(tokens, wanted.hidden_states[1:], strict=True):
        assert torch.equal(ours, theirs)
    last = wanted.last_hidden_state
    if kind == "clip_vision_model":  # there the norm sees the class token only
        last = backbone.model.post_layernorm(last)
    assert torch.equal(finished, last)
    # The one list of as many modules as there are layers is the list of layers.
    lists = [m for m in backbone.model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    assert lists == [backbone.stepper.layers]


def test_patch_size_round_trip() -> None:
    for kind in ("dinov2", "vit", "dinov3_vit", "siglip_vision_model"):
        backbone = vision(kind, (64, 96))
        images = torch.rand(1, 3, 64, 96)
        before = step(backbone, images)[1]
        backbone.resize((64, 96), 8)
        assert backbone.grid == (8, 12)
        assert step(backbone, images)[1].shape[1] == backbone.token_shape.num_tokens
        backbone.resize((64, 96), 16)
        assert torch.equal(step(backbone, images)[1], before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pairs_equal_the_library(kind: str) -> None:
    backbone = pair(kind)
    images = torch.randn(2, 3, 80, 112, generator=torch.Generator().manual_seed(2))
    model = backbone.model
    finished = step(backbone, images)[1]
    pooled, dense = backbone.project(finished)
    wanted = model.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    assert torch.equal(pooled[:, 0], wanted)
    assert dense.shape == (2, 35, backbone.text_dim)
    ids = check_texts(backbone)
    with pytest.raises(MFuserError, match="10 context tokens and 9 slots"):
        backbone.encode_text(ids, torch.zeros(10, 64))


@torch.no_grad()
def test_the_probe_as_query_gives_siglips_pool() -> None:
    backbone = pair("siglip")
    head = backbone.model.vision_model.head
    tokens = step(backbone, torch.rand(1, 3, 80, 112))[1]
    swapped = head.attention(head.probe, tokens, tokens, need_weights=False)[0]
    # Attention with and without its weights: two kernels, rounding.
    torch.testing.assert_close(
        swapped + head.mlp(head.layernorm(swapped)), head(tokens)[:, None], rtol=1e-4, atol=1e-5
    )
    # Every token asks in the same way: a probe equal to the projection of a token is that token.
    dense = backbone.project(tokens)[1]
    one = head.attention(tokens[:, 3:4], tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(
        dense[:, 3:4], one + head.mlp(head.layernorm(one)), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_clips_class_token_through_the_dense_path_is_the_global_embedding() -> None:
    backbone = pair("clip")
    tokens = step(backbone, torch.rand(1, 3, 80, 112))[1]
    swapped = torch.cat([tokens[:, :1], tokens[:, :1], tokens[:, 2:]], dim=1)
    torch.testing.assert_close(
        backbone.project(swapped)[1][:, :1], backbone.project(tokens)[0], rtol=1e-5, atol=1e-6
    )


def test_alignment_and_training() -> None:
    clip, siglip = pair("clip", freeze=False), pair("siglip")
    assert (clip.alignment, siglip.alignment) == ("softmax", "sigmoid")
    assert siglip.logit_scale_bias()[1].dim() == 0 and clip.logit_scale_bias()[1] is None
    assert [n for n, p in clip.named_parameters() if not p.requires_grad] == ["model.logit_scale"]
    assert not any(p.requires_grad for p in siglip.parameters())
    clip.train()
    assert not any(m.training for m in clip.modules())


def save(folder: Path, kind: str = "dinov2") -> Any:
    backbone = vision(kind, (64, 64))
    backbone.model.save_pretrained(folder)
    return backbone


def test_local_folders(tmp_path: Path) -> None:
    original = save(tmp_path)
    with pytest.raises(WeightsError, match=r"no preprocessor_config.json.*mean = "):
        HuggingFaceVisionSpec(model=str(tmp_path)).build((64, 64))
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    loaded = HuggingFaceVisionSpec(model=str(tmp_path), depth=2).build((64, 96))
    assert loaded.depth == 2 and loaded.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    images = torch.rand(1, 3, 64, 96)
    original.resize((64, 96))
    assert torch.equal(step(loaded, images)[0][1], step(original, images)[0][1])


def test_broken_folders(tmp_path: Path) -> None:
    save(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="cannot be loaded"):
        HuggingFaceVisionSpec(model=str(tmp_path)).build((64, 64))
    weights.write_bytes(content)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(WeightsError, match=r"1\d missing, 0 of another shape \(encoder.layer.3"):
        HuggingFaceVisionSpec(model=str(tmp_path)).build((64, 64))
    with pytest.raises(WeightsError, match="no config.json in that folder"):
        HuggingFaceVisionSpec(model=str(tmp_path / "nothing")).build((64, 64))


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def fails(message: str, **spec: Any) -> None:
        with pytest.raises(MFuserError, match=message):
            HuggingFaceVisionSpec(**spec).build((64, 64))

    fails("needs config = ", model="random")
    fails(
        "cannot be stepped here.*dinov2",
        model="random",
        config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8]},
    )
    fails("did you mean 'dinov2'", model="random", config={"model_type": "dinov22"})
    fails("has its own", model="facebook/dinov2-small", config={"model_type": "dinov2"})
    fails("has 3 blocks", model="random", config={**HF_VISION, "model_type": "dinov2"}, depth=4)
    with pytest.raises(MFuserError, match="no text tower"):
        HuggingFacePairSpec(model="random", config={**HF_VISION, "model_type": "dinov2"}).build(
            (64, 64)
        )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    fails("hf download nobody/nothing", model="nobody/nothing")


@pytest.mark.parametrize("kind", ["vision", "vision_language"])
def test_weights_random_or_from_a_file(kind: str, tmp_path: Path) -> None:
    made = {"vision": HuggingFaceVisionSpec, "vision_language": HuggingFacePairSpec}[kind]
    config = dict(made.tiny["config"])
    source: Any = made(model="random", config=config).build((64, 96))
    folder = tmp_path / "saved"
    whole = transformers.AutoModel.from_config(source.model.config)
    whole.save_pretrained(folder)
    state = {k: v.clone() for k, v in whole.state_dict().items()}
    torch.save({"state_dict": {f"net.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    (folder / "model.safetensors").unlink()
    random: Any = made(model=str(folder), weights="random").build((64, 96))
    assert random.depth == 2
    for model, options in ((str(folder), {}), ("random", {"config": config})):
        given: Any = made(
            model=model, weights=str(tmp_path / "w.pth"), mean=(0.5,) * 3, std=(0.5,) * 3, **options
        ).build((64, 96))
        held = given.model.state_dict()
        assert held.keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in held.items() if v.shape == state[k].shape)
    with pytest.raises(WeightsError, match='weights = "lvd142m" of .*give a local file'):
        made(model=str(folder), weights="lvd142m").build((64, 96))
