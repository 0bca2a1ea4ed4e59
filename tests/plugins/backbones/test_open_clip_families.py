"""open_clip's CoCa, Hugging Face text towers and relative positions; what has no token stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stepping import perturb
from torch import Tensor, nn

from mfuser import MFuserError
from mfuser_plugins.backbones.open_clip import OpenClipSpec

TEXT = {"width": 48, "heads": 4, "layers": 2}
VISION = {"width": 64, "layers": 3, "head_width": 16}
COCA: dict[str, Any] = {
    "embed_dim": 32, "text_cfg": TEXT, "vision_cfg": {**VISION, "attn_pooler_heads": 4},
    "multimodal_cfg": {"width": 32, "heads": 2, "layers": 1},
}  # fmt: skip
RELPOS: dict[str, Any] = {
    "embed_dim": 32, "text_cfg": TEXT,
    "vision_cfg": {"timm_model_kwargs": {"depth": 2, "embed_dim": 64, "num_heads": 4}},
}  # fmt: skip
HF = {
    "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "intermediate_size": 64, "vocab_size": 1000, "max_position_embeddings": 34},
    "xlm-roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "intermediate_size": 64, "vocab_size": 1000, "max_position_embeddings": 34},
    "mt5": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64,
            "vocab_size": 1000},
    "m2m_100": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
                "encoder_ffn_dim": 64, "decoder_layers": 1, "decoder_attention_heads": 2,
                "decoder_ffn_dim": 64, "vocab_size": 1000},
}  # fmt: skip
HF_MODELS = {
    "roberta-ViT-B-32": "roberta", "xlm-roberta-base-ViT-B-32": "xlm-roberta",
    "mt5-base-ViT-B-32": "mt5", "nllb-clip-base": "m2m_100",
}  # fmt: skip


def build(name: str, options: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    spec = {"weights": "random", **more}
    backbone = OpenClipSpec(model=name, options=options, **spec).build((96, 128))
    perturb(backbone.model)
    return backbone


def check_images(backbone: Any, **options: Any) -> None:
    for size in ((96, 128), (224, 160)):
        backbone.resize(size)
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        stream = backbone.embed(images)
        tokens = stream.tokens
        for i in range(backbone.depth):
            tokens = backbone.block(i, tokens, stream.state)
        pooled, dense = backbone.project(backbone.finish(tokens, stream.state))
        assert pooled.shape == (2, 1, backbone.text_dim)
        assert torch.equal(pooled[:, 0], backbone.model.encode_image(images, **options))
        assert dense.shape == (2, backbone.grid[0] * backbone.grid[1], backbone.text_dim)
        assert dense.isfinite().all()


def check_text(backbone: Any, ids: Tensor, table: nn.Embedding, **options: Any) -> None:
    model = backbone.model
    assert torch.equal(backbone.encode_text(ids), model.encode_text(ids, **options))
    extra = torch.tensor([500, 600, 700])
    full = torch.cat([ids[:, :1], extra.expand(len(ids), -1), ids[:, 1:]], dim=1)
    ours = backbone.encode_text(ids, table(extra))
    # Positions of what is masked differ in RoBERTa; the kernels' order of summation too.
    torch.testing.assert_close(ours, model.encode_text(full, **options), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, backbone.encode_text(ids), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_base"])
def test_coca_equals_the_library(name: str) -> None:
    backbone = build(name, COCA)
    assert backbone.model.text_decoder is None
    check_images(backbone, normalize=False)
    ids = backbone.tokenize(["road", "traffic light"], 9)
    assert backbone.text.positions == 76
    check_text(backbone, ids, backbone.model.text.token_embedding, normalize=False)
    with pytest.raises(MFuserError, match="do not fit into the 76"):
        backbone.encode_text(ids, torch.zeros(68, 48))


@torch.no_grad()
def test_cocas_dense_embedding_is_the_pool_of_that_token_alone() -> None:
    backbone = build("coca_ViT-B-32", COCA)
    tokens = torch.randn(2, 13, 64)
    _, dense = backbone.project(tokens)
    alone, _ = backbone.project(tokens[:, 5:6].expand(-1, 2, -1))
    torch.testing.assert_close(dense[:, 4], alone[:, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cocas_file_is_loaded_with_its_decoder(tmp_path: Path) -> None:
    import open_clip
    from open_clip.coca_model import CoCa

    from mfuser_plugins.backbones.open_clip import merge

    cfg = open_clip.get_model_config("coca_ViT-B-32")
    merge(cfg, COCA)
    cfg.pop("custom_text", None)
    library = CoCa(**cfg)
    perturb(library)
    save_file(
        {k: v.contiguous() for k, v in library.state_dict().items()}, tmp_path / "a.safetensors"
    )
    loaded = OpenClipSpec(
        model="coca_ViT-B-32", weights=str(tmp_path / "a.safetensors"), options=COCA
    ).build((224, 224))
    whole = library.state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in loaded.model.state_dict().items())


@torch.no_grad()
def test_relative_positions_equal_the_library() -> None:
    backbone = build("vit_relpos_medium_patch16_cls_224", RELPOS)
    check_images(backbone)


@torch.no_grad()
def test_options_of_a_projected_trunk_leave_its_pooling_alone() -> None:
    small = {"timm_model_kwargs": {"depth": 1}}
    backbone = build("ViTamin-S", {"embed_dim": 32, "text_cfg": TEXT, "vision_cfg": small})
    check_images(backbone)


@torch.no_grad()
@pytest.mark.parametrize("name", HF_MODELS)
def test_hugging_face_towers_equal_the_library(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind = HF_MODELS[name]
    transformers.AutoConfig.for_model(kind, **HF[kind]).save_pretrained(tmp_path)
    options = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {"hf_model_name": str(tmp_path)}}
    backbone = build(name, options)
    assert backbone.context_dim == 32 and backbone.text_dim == 24
    pad = backbone.text.pad
    ids = torch.tensor([[5, 70, 80, 2, pad, pad], [5, 90, 2, pad, pad, pad]])
    check_text(backbone, ids, backbone.model.text.transformer.get_input_embeddings())


def test_what_has_no_token_stream_is_refused() -> None:
    for name, why in (
        ("RN50", "ModifiedResNet, which has no stream"),
        ("convnext_base", "ConvNeXt .timm., which has no stream"),
        ("swin_base_patch4_window7_224", "SwinTransformer .timm., which has no stream"),
    ):
        with torch.device("meta"), pytest.raises(MFuserError, match=why):
            OpenClipSpec(model=name, weights="random").build((224, 224))
