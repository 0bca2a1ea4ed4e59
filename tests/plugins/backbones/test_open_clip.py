"""open_clip backbones: images and text equal the library's own encodings, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from stepping import perturb

from mfuser import MFuserError, WeightsError
from mfuser_plugins.backbones import _text
from mfuser_plugins.backbones._clip import ClipBackbone, TimmClipBackbone, attend
from mfuser_plugins.backbones.open_clip import OpenClipSpec

TEXT = {"width": 48, "heads": 4, "layers": 2}
OWN: dict[str, Any] = {
    "embed_dim": 32, "vision_cfg": {"width": 64, "layers": 3, "head_width": 16}, "text_cfg": TEXT,
}  # fmt: skip


def trunk(embed_dim: int = 32, **options: Any) -> dict[str, Any]:
    """Options for a model whose image tower is timm's."""
    small = {"depth": 2, "embed_dim": 64, "num_heads": 4, **options}
    return {
        "embed_dim": embed_dim, "vision_cfg": {"timm_model_kwargs": small}, "text_cfg": TEXT,
    }  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "ViT-B-16": OWN,
    "ViT-L-14-336-quickgelu": OWN,
    "ViT-B-16-plus-240": OWN,
    "ViT-L-14-CLIPA-336": OWN,  # average pool before the norm, no norm before the blocks
    "EVA02-L-14-336": trunk(),
    "EVA01-g-14": trunk(),
    "ViT-L-16-SigLIP-384": trunk(64),
    "ViT-L-16-SigLIP2-256": trunk(64),
    "PE-Core-L-14-336": trunk(attn_pool_num_heads=4),  # pool that sees the class token, projection
    "ViT-B-16-SigLIP-i18n-256": trunk(64),  # text without projection: 48 wide
}
MODELS["ViT-B-16-SigLIP-i18n-256"]["text_cfg"] = {**TEXT, "width": 64}


def build(
    name: str, size: tuple[int, int] = (96, 128), options: dict[str, Any] | None = None, **more: Any
) -> ClipBackbone:
    torch.manual_seed(0)
    backbone = OpenClipSpec(
        model=name, weights="random", options=MODELS[name] if options is None else options, **more
    ).build(size)
    perturb(backbone.model)
    return backbone


def images_for(backbone: ClipBackbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, *backbone.image_size, generator=generator)


def step(backbone: ClipBackbone, images: torch.Tensor) -> torch.Tensor:
    stream = backbone.embed(images)
    tokens = stream.tokens
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, stream.state)
    return backbone.finish(tokens, stream.state)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_images_equal_encode_image(name: str) -> None:
    backbone = build(name)
    for size in ((96, 128), (224, 160)):
        backbone.resize(size)
        images = images_for(backbone)
        tokens = step(backbone, images)
        assert tokens.shape == (2, backbone.token_shape.num_tokens, backbone.embed_dim)
        pooled, dense = backbone.project(tokens)
        model: Any = backbone.model
        assert torch.equal(pooled[:, 0], model.encode_image(images))
        h, w = backbone.grid
        assert dense.shape == (2, h * w, backbone.text_dim)
        assert (h, w) == (size[0] // backbone.patch_size[0], size[1] // backbone.patch_size[1])


@torch.no_grad()
def test_blocks_equal_the_librarys_intermediates() -> None:
    for name in ("ViT-B-16", "EVA02-L-14-336"):
        backbone = build(name)
        images = images_for(backbone)
        visual: Any = backbone.model.get_submodule("visual")
        wanted = visual.forward_intermediates(images, output_fmt="NLC")["image_intermediates"]
        stream = backbone.embed(images)
        tokens = stream.tokens
        for i, spatial in enumerate(wanted):
            tokens = backbone.block(i, tokens, stream.state)
            assert torch.equal(tokens[:, 1:], spatial)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT-B-16", "EVA02-L-14-336"])
def test_the_class_token_through_the_dense_path_is_the_global_embedding(name: str) -> None:
    backbone = build(name)
    tokens = step(backbone, images_for(backbone))
    # The class token in the place of the first patch.
    swapped = torch.cat([tokens[:, :1], tokens[:, :1], tokens[:, 2:]], dim=1)
    pooled, _ = backbone.project(tokens)
    _, dense = backbone.project(swapped)
    # One row of a matrix product against a product of its own: rounding.
    torch.testing.assert_close(dense[:, :1], pooled, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT-L-16-SigLIP-384", "PE-Core-L-14-336"])
def test_the_latent_as_query_gives_the_librarys_pool(name: str) -> None:
    backbone = build(name)
    assert isinstance(backbone, TimmClipBackbone)
    trunk: Any = backbone.model.get_submodule("visual.trunk")
    tokens = step(backbone, images_for(backbone))
    latent = trunk.attn_pool.latent.expand(len(tokens), -1, -1)
    pooled = attend(trunk.attn_pool, latent, backbone._pool_keys(trunk, tokens))
    assert torch.equal(pooled[:, 0], trunk.pool(tokens))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_text_equals_encode_text(name: str) -> None:
    backbone = build(name)
    model: Any = backbone.model
    length, text = backbone.text.positions, backbone.text
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, text.vocabulary - 1, (4, length), generator=generator)
    ids[:, length // 2] = text.vocabulary - 1  # the largest id ends the text for "argmax"
    ids[:, length // 2 + 1] = text.eos_id
    wanted = model.encode_text(ids)
    assert torch.equal(backbone.encode_text(ids), wanted)
    assert torch.equal(backbone.encode_text(ids, torch.zeros(0, backbone.context_dim)), wanted)

    # Context rows out of the token table: the same as the full ids.
    n = 5
    ids[:, 1 : 1 + n] = ids[:1, 1 : 1 + n]
    context = text.parts.token_embedding(ids[0, 1 : 1 + n])
    short = torch.cat([ids[:, :1], ids[:, 1 + n :]], dim=1)
    assert torch.equal(backbone.encode_text(short, context), model.encode_text(ids))
    assert not torch.allclose(backbone.encode_text(short, context + 1), model.encode_text(ids))


@torch.no_grad()
def test_cutting_slots_changes_nothing_where_the_end_of_text_is_pooled() -> None:
    backbone = build("ViT-B-16")
    names = ["road", "traffic light"]
    short = backbone.encode_text(backbone.tokenize(names, 5))
    full = backbone.encode_text(backbone.tokenize(names, 77))
    # Causal attention over fewer padding tokens: rounding.
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-5)


def test_context_gets_gradients_through_the_frozen_tower() -> None:
    backbone = build("EVA02-L-14-336")
    context = torch.randn(8, backbone.context_dim, requires_grad=True)
    backbone.encode_text(backbone.tokenize(["road", "sky"], 5), context).sum().backward()
    assert context.grad is not None and bool(context.grad.abs().sum() > 0)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_tokens() -> None:
    backbone = build("ViT-B-16")
    ids = backbone.tokenize(["road", "traffic light"], 5)
    assert ids.dtype == torch.int64
    assert ids[:, 0].tolist() == [49406, 49406]
    assert ids[0, 2] == ids[1, 3] == 49407
    with pytest.raises(MFuserError, match="'traffic light' takes 4 tokens.*prompt.slots = 4"):
        backbone.tokenize(["road", "traffic light"], 3)
    with pytest.raises(MFuserError, match="80 context tokens and 5 slots.*77 positions"):
        backbone.encode_text(ids, torch.zeros(80, backbone.context_dim))
    with pytest.raises(MFuserError, match=r"need \(n, 48\)"):
        backbone.encode_text(ids, torch.zeros(2, 32))
    small = {**OWN, "text_cfg": {**TEXT, "vocab_size": 1000}}
    with pytest.raises(MFuserError, match="knows 1000 tokens"):
        build("ViT-B-16", options=small).tokenize(["road"], 5)


@pytest.mark.usefixtures("cache")
def test_a_tokenizer_that_is_absent_says_how_to_get_it() -> None:
    with pytest.raises(WeightsError, match=r"hf download timm/ViT-B-16-SigLIP.*tokenizer = "):
        build("ViT-L-16-SigLIP-384").tokenize(["road"], 5)
    options = trunk(64)
    options["text_cfg"] = {**TEXT, "vocab_size": 49408}
    shipped = build("ViT-L-16-SigLIP-384", options=options, tokenizer="simple")
    assert shipped.tokenize(["road"], 5).shape == (1, 5)


def test_alignment_scale_and_statistics() -> None:
    clip, siglip = build("EVA02-L-14-336"), build("ViT-L-16-SigLIP-384")
    scale, bias = clip.logit_scale_bias()
    assert clip.alignment == "softmax" and bias is None and scale.dim() == 0
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    scale, bias = siglip.logit_scale_bias()
    assert siglip.alignment == "sigmoid" and bias is not None and bias.item() == -10
    assert clip.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert siglip.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_what_trains_when_not_frozen() -> None:
    backbone = build("ViT-B-16", freeze=False)
    still = [n for n, p in backbone.named_parameters() if not p.requires_grad]
    # The alignment loss of a softmax model has a temperature of its own.
    assert still == ["model.logit_scale"]
    backbone.train()
    assert not any(m.training for m in backbone.modules())
    backbone.resize((64, 64), 8)
    assert [n for n, p in backbone.named_parameters() if not p.requires_grad] == still


def test_stochastic_depth_is_off_unless_the_spec_asks_for_it() -> None:
    options = trunk()
    options["vision_cfg"]["timm_drop_path"] = 0.5
    brought = build("EVA02-L-14-336", options=options, freeze=False)
    brought.train()
    assert not any(m.training for m in brought.modules())
    asked = build("ViT-B-16", drop_path=0.5)
    assert not any(m.training for m in asked.modules())
    asked.train()
    assert {type(m).__name__ for m in asked.modules() if m.training} == {"DropPath"}
    asked.eval()
    assert not any(m.training for m in asked.modules())


def test_resize_of_the_own_tower_equals_open_clips() -> None:
    import open_clip
    from open_clip.model import resize_pos_embed

    ours = build("ViT-B-16", (224, 224), antialias=True)
    state = dict(ours.model.state_dict())
    library = open_clip.CLIP(
        32, {**OWN["vision_cfg"], "image_size": (160, 320), "patch_size": 16}, TEXT
    )
    resize_pos_embed(state, library)
    ours.resize((160, 320))
    table = ours.model.get_parameter("visual.positional_embedding")
    assert torch.equal(table, state["visual.positional_embedding"])
    ours.resize((64, 64), 32)
    ours.resize((160, 320), 16)
    assert torch.equal(ours.model.get_parameter("visual.positional_embedding"), table)
    assert torch.equal(
        ours.model.get_parameter("visual.conv1.weight"), state["visual.conv1.weight"]
    )


@pytest.mark.parametrize("name", ["ViT-B-16", "EVA02-L-14-336"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_local_files(name: str, suffix: str, tmp_path: Path) -> None:
    size = {"ViT-B-16": (224, 224), "EVA02-L-14-336": (336, 336)}[name]
    source = build(name, size)
    state = {k: v.half().contiguous() for k, v in source.model.state_dict().items()}
    if name == "EVA02-L-14-336" and suffix == ".pt":
        # Files from before CustomTextCLIP keep the text tower at the top.
        state = {k.removeprefix("text."): v for k, v in state.items()}
    path = tmp_path / f"clip{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        save_file(state, path)
    spec = OpenClipSpec(model=name, weights=str(path), options=MODELS[name])
    loaded = spec.build(size).model.state_dict()
    for key, value in source.model.state_dict().items():
        assert torch.equal(loaded[key], value.half().float()), key
    other = {**MODELS[name], "text_cfg": {**TEXT, "layers": 3}}
    with pytest.raises(WeightsError, match=r"12 missing \(.*resblocks.2.*another architecture"):
        OpenClipSpec(model=name, weights=str(path), options=other).build(size)


def test_baai_names_of_eva_clip(tmp_path: Path) -> None:
    source = build("EVA02-L-14-336", (336, 336))
    names = [
        ("visual.trunk.", "visual."), ("attn.norm.", "attn.inner_attn_ln."),
        ("mlp.norm.", "mlp.ffn_ln."), ("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3"),
        ("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias"),
    ]  # fmt: skip
    state = {"visual.rope.freqs_cos": torch.zeros(576, 16)}
    for key, value in source.model.state_dict().items():
        for ours, theirs in names:
            key = key.replace(ours, theirs) if key.startswith("visual.") else key
        state[key] = value
    assert "visual.blocks.0.mlp.w1.weight" in state and "visual.blocks.0.attn.q_bias" in state
    torch.save(state, tmp_path / "EVA02_CLIP.pt")
    spec = OpenClipSpec(
        model="EVA02-L-14-336", weights=str(tmp_path / "EVA02_CLIP.pt"),
        options=MODELS["EVA02-L-14-336"],
    )  # fmt: skip
    loaded = spec.build((336, 336)).model.state_dict()
    for key, value in source.model.state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_files_of_openai_need_quick_gelu(tmp_path: Path) -> None:
    source = build("ViT-B-16", (224, 224))
    state = {**source.model.state_dict(), "input_resolution": torch.tensor(224)}
    torch.save(state, tmp_path / "ViT-B-16.pt")
    options = {"weights": str(tmp_path / "ViT-B-16.pt"), "options": OWN}
    with pytest.raises(WeightsError, match="QuickGELU.*ViT-B-16-quickgelu"):
        OpenClipSpec(model="ViT-B-16", **options).build((224, 224))
    loaded = OpenClipSpec(model="ViT-B-16-quickgelu", **options).build((224, 224))
    table = loaded.model.get_parameter("visual.positional_embedding")
    assert torch.equal(table, state["visual.positional_embedding"])


def test_models_and_their_copies_share_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it takes a tenth of a second, and so would copying its tables with a model."""
    read = []

    class Counted(SimpleTokenizer):
        def __init__(self, **options: Any) -> None:
            read.append(options)
            super().__init__(**options)

    monkeypatch.setattr(_text, "SimpleTokenizer", Counted)
    one, two = build("ViT-B-16"), build("ViT-L-14-336-quickgelu")
    ids = [tower.tokenize(["road"], 8) for tower in (one, two, copy.deepcopy(one))]
    assert len(read) == 1 and all(torch.equal(ids[0], other) for other in ids)


@pytest.mark.parametrize(("spec", "message"), [
    ({"model": "ViT-B-17"}, "did you mean 'ViT-B-1"),
    ({"model": "ViT-B-16", "weights": "laion9b"}, "no weights 'laion9b'.*available: .*laion2b"),
    ({"model": "ViT-L-14-336", "weights": "openai"}, "QuickGELU.*ViT-L-14-336-quickgelu"),
    ({"model": "ViT-B-16-quickgelu", "weights": "laion2b_s34b_b88k"}, "GELU|no weights"),
    ({"model": "RN50"}, "ModifiedResNet.*no stream of tokens"),
    ({"model": "convnext_base"}, "of class ConvNeXt"),
    ({"model": "roberta-ViT-B-32"}, "config.json.*hf_model_name"),
    ({"model": "ViT-B-16", "options": {"vision_cfg": {"color": 1}}}, "color"),
    ({"model": "ViT-B-16", "options": {"vision_cfg": {"timm_model_kwargs": {}}}}, "towers of timm"),
    ({"model": "ViT-L-16-SigLIP-384", "options": trunk(32)}, "embed_dim = 64"),
])  # fmt: skip
def test_mistakes_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(MFuserError, match=message):
        OpenClipSpec(**{"weights": "random", **spec}).build((224, 224))
