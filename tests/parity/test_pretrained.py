"""Pretrained backbones (no MFuser checkpoint) at 512 pixels, as the released loaders make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import below, golden
from safetensors.torch import save_file
from torch import Tensor

from mfuser import PairingSpec, components, load_registry

TEXT = {"width": 24, "heads": 2, "layers": 1, "vocab_size": 64}
PAIRINGS = {
    "eva": "dinov2-l_eva02-clip-l",
    "clip": "dinov2-l_clip-l",
    "siglip": "dinov2-l_siglip-l",
}
TABLES = {
    "eva": ("visual.trunk.pos_embed", "visual.trunk.patch_embed.proj.weight"),
    "clip": ("visual.positional_embedding", "visual.conv1.weight"),
    "siglip": ("visual.trunk.pos_embed", "visual.trunk.patch_embed.proj.weight"),
}
POSITIONS = {"eva": "text.positional_embedding", "clip": "positional_embedding"}


def shipped(kind: str) -> PairingSpec:
    return load_registry().pairing(PAIRINGS[kind])


def from_file(
    base: str, spec: dict[str, Any], tables: dict[str, Tensor], tmp_path: Path, native: int
) -> Any:
    """A backbone whose pretrained file holds `tables`, loaded as the shipped pairing says."""
    make = components(base)[spec["name"]]
    random = make(**{**spec, "weights": "random", "patch_size": None, "context_length": None}
                  if base == "vision_language" else {**spec, "weights": "random",
                  "patch_size": None}).build((native, native))  # fmt: skip
    state = {k: v.contiguous() for k, v in random.model.state_dict().items()}
    assert tables.keys() <= state.keys()
    file = tmp_path / "pretrained.safetensors"
    save_file({**state, **tables}, file)
    return make(**{**spec, "weights": str(file)}).build((512, 512))


def vfm(kind: str, tables: dict[str, Tensor], tmp_path: Path) -> Any:
    released = shipped(kind).vfm
    assert released is not None
    given = released.model_dump(include={"interpolation", "antialias", "patch_size"})
    spec = {
        "name": "timm",
        "model": "vit_large_patch14_dinov2",
        "options": {"embed_dim": tables["pos_embed"].shape[-1], "depth": 1, "num_heads": 1},
        "patch_resample": released.patch_resample,  # type: ignore[attr-defined]
    }
    return from_file("vision", {**spec, **given}, tables, tmp_path, 518)


def vlm(kind: str, tables: dict[str, Tensor], tmp_path: Path) -> Any:
    released = shipped(kind).vlm
    assert released is not None
    given = released.model_dump(exclude={"weights", "options", "tokenizer", "mean", "std"})
    width = tables[TABLES[kind][0]].shape[-1]
    trunk = {"timm_model_kwargs": {"embed_dim": width, "depth": 1, "num_heads": width // 16}}
    options = {
        "embed_dim": width if kind == "siglip" else 24,
        "text_cfg": TEXT,
        "vision_cfg": {"width": width, "layers": 1, "head_width": 16} if kind == "clip" else trunk,
    }
    return from_file(
        "vision_language",
        {**given, "options": options},
        tables,
        tmp_path,
        384 if kind == "siglip" else 336,
    )


def resized(table: Tensor, prefix: int, size: int, mode: str) -> Tensor:
    """Rows of a square grid, enlarged like an image; align_corners=False, no antialiasing."""
    head, rows = table[:prefix], table[prefix:]
    side = round(len(rows) ** 0.5)
    image = rows.T.reshape(1, -1, side, side)
    image = F.interpolate(image, size=(size, size), mode=mode, align_corners=False)
    return torch.cat([head, image[0].flatten(1).T])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_tables_for_patches_of_16(kind: str, tmp_path: Path) -> None:
    """Grid 37 -> 32 and kernel 14 -> 16 bicubic (DINOv2); 24 -> 32 and 14 -> 16 bilinear (CLIP)."""
    dino = {
        "pos_embed": torch.randn(1, 1370, 32),
        "patch_embed.proj.weight": torch.randn(32, 3, 14, 14),
    }
    model = vfm(kind, dino, tmp_path).model
    wanted = resized(dino["pos_embed"][0], 1, 32, "bicubic")
    assert torch.allclose(model.pos_embed[0], wanted, atol=1e-5)
    kernel = F.interpolate(dino["patch_embed.proj.weight"], size=(16, 16), mode="bicubic")
    assert torch.allclose(model.patch_embed.proj.weight, kernel, atol=1e-5)

    table, kernel_name = TABLES[kind]
    patch, prefix = (14, 1) if kind == "clip" else (16, 0)
    rows = torch.randn(prefix + 576, 32)
    tables = {
        table: rows if kind == "clip" else rows[None],
        kernel_name: torch.randn(32, 3, patch, patch),
    }
    model = vlm(kind, tables, tmp_path).model
    got = model.get_parameter(table).reshape(-1, 32)
    assert torch.allclose(got, resized(rows, prefix, 32, "bilinear"), atol=1e-5)
    wanted = F.interpolate(tables[kernel_name], size=(16, 16), mode="bilinear")
    assert torch.allclose(model.get_parameter(kernel_name), wanted, atol=1e-5)


def test_released_loaders(tmp_path: Path) -> None:
    file = golden("pretrained_load")
    source, wanted = below(file, "eva.src."), below(file, "eva.dst.")
    dino = vfm("eva", below(source, "dino."), tmp_path).model
    table, kernel = TABLES["eva"]
    tables = {
        table: source["visual.pos_embed"],
        kernel: source["visual.patch_embed.proj.weight"],
        POSITIONS["eva"]: source["text.positional_embedding"],
    }
    model = vlm("eva", tables, tmp_path).model
    sin, cos = model.visual.trunk.rope.get_embed().chunk(2, -1)
    got = {
        "backbone.dinov2.pos_embed": dino.pos_embed,
        "backbone.dinov2.patch_embed.proj.weight": dino.patch_embed.proj.weight,
        "backbone.pos_embed": model.get_parameter(table),
        "backbone.patch_embed.proj.weight": model.get_parameter(kernel),
        "text_encoder.positional_embedding": model.get_parameter(POSITIONS["eva"]),
        "backbone.rope.freqs_sin": sin,
        "backbone.rope.freqs_cos": cos,
    }
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name


def test_stochastic_depth_acts_while_the_model_trains_only(tmp_path: Path) -> None:
    spec = components("vision_language")["open_clip"](
        name="open_clip",
        model="ViT-L-14-336-quickgelu",
        weights="random",
        drop_path=0.5,
        options={"embed_dim": 24, "text_cfg": TEXT, "vision_cfg": {"width": 32, "layers": 3,
                 "head_width": 16}},
    )  # fmt: skip
    backbone = spec.build((28, 28))
    tokens = torch.randn(64, 5, 32)
    first = [backbone.block(i, tokens, None) for i in range(3)]
    backbone.train()
    assert torch.equal(backbone.block(0, tokens, None), first[0])  # the rate rises from zero
    dropped = backbone.block(2, tokens, None)
    kept = (dropped != tokens).flatten(1).any(1)
    assert 0.5 < kept.float().mean() < 1  # two draws of 0.5 for each image
    backbone.eval()
    assert torch.equal(backbone.block(2, tokens, None), first[2])
