from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfuser import DGSSModel, MFuserError, VisionBackbone, build_model, components
from mfuser.engine import checkpoints
from mfuser_plugins.tuning.lora import LoraSpec, LowRank, merge, tune

SIZE = (64, 96)
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "timm": ("vision", {"name": "timm", "model": "vit_tiny_patch16_224"}),
    # Fused query, key and value, whose weight is taken without calling the layer.
    "eva": ("vision", {"name": "timm", "model": "eva_giant_patch14_224"}),
    # Torch's own attention, whose input weight belongs to no linear layer.
    "open_clip": ("vision_language", {"name": "open_clip", "model": "ViT-B-16"}),
}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2},
}
EVERY = pytest.mark.parametrize("which", BACKBONES)


def backbone(which: str) -> VisionBackbone:
    kind, table = BACKBONES[which]
    options = CLIP if which == "open_clip" else SMALL
    spec = components(kind)[table["name"]](**table, weights="random", options=options)
    return spec.build(SIZE)  # type: ignore[attr-defined, no-any-return]


def run(tower: VisionBackbone, images: Tensor) -> Tensor:
    stream = tower.embed(images)
    tokens = stream.tokens
    for i in range(tower.depth):
        tokens = tower.block(i, tokens, stream.state)
    return tokens


def randomize(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, LowRank):
            nn.init.normal_(part.up, std=0.1)


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


@EVERY
def test_starts_from_the_encoder_and_folds_into_it(which: str) -> None:
    images = torch.rand(1, 3, *SIZE)
    tower = backbone(which)
    before = run(tower, images)
    names = set(tower.state_dict())
    LoraSpec(rank=3).build(tower)
    # Torch's attention takes another kernel where gradients are asked for.
    torch.testing.assert_close(run(tower, images), before)
    randomize(tower)
    tuned = run(tower, images)
    assert (tuned - before).abs().max() > 1e-3 * before.abs().max()
    merged = merge(copy.deepcopy(tower))
    assert isinstance(merged, VisionBackbone)
    torch.testing.assert_close(run(merged, images), tuned)
    assert set(merged.state_dict()) == names and not trained(merged)


@EVERY
def test_every_update_gets_a_gradient_and_nothing_else_does(which: str) -> None:
    tower = backbone(which)
    LoraSpec(rank=2).build(tower)
    randomize(tower)
    run(tower, torch.rand(1, 3, *SIZE)).square().sum().backward()
    names = trained(tower)
    # Four linear maps in each of two blocks, an update of two matrices each.
    assert len(names) == 2 * 4 * 2
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
        if name in names:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_update_is_scaled_and_of_low_rank() -> None:
    weight = torch.randn(6, 5)
    update = LowRank(weight, rank=2, alpha=8.0)
    nn.init.normal_(update.up)
    change = update(weight) - weight
    torch.testing.assert_close(change, 4 * update.up @ update.down)
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 2


def test_layers_by_pattern() -> None:
    tower = backbone("timm")
    LoraSpec(rank=2, layers=("attn.qkv", "mlp.*")).build(tower)
    tuned = {n.split(".parametrizations")[0].split("blocks.")[1] for n in trained(tower)}
    assert tuned == {f"{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")}


def test_unknown_layers_name_what_there_is() -> None:
    with pytest.raises(MFuserError, match="'query' fits no linear layer.*attn.in_proj.*mlp.c_fc"):
        tune(backbone("open_clip"), ("query",), 2, 2.0)


def test_text_encoders_are_left_alone() -> None:
    tower = backbone("open_clip")
    LoraSpec(rank=2).build(tower)
    assert all(".visual." in name for name in trained(tower))


def test_beside_fusion_it_trains_and_is_saved(tiny) -> None:  # type: ignore[no-untyped-def]
    model = build_model("tiny", tiny, tuning={"name": "lora", "rank": 2})
    assert isinstance(model, DGSSModel)
    plain = build_model("tiny", tiny)
    images, labels = torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96))
    added = set(checkpoints.trained_state(model)) - set(checkpoints.trained_state(plain))
    assert {name.split(".")[1] for name in added} == {"vfm", "vlm"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    losses = model(images, labels)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    ups = {n for n in before if n.endswith(".up")}
    assert ups and ups <= changed
    assert not any(n.endswith(".original") for n in changed)
    scores = model.segment(images)
    merge(model)
    torch.testing.assert_close(model.segment(images), scores)


def test_one_encoder_alone(tiny) -> None:  # type: ignore[no-untyped-def]
    model = build_model("plain", tiny, tuning={"name": "lora", "rank": 2, "encoders": ["vlm"]})
    updates = [n for n in trained(model) if "parametrizations" in n]
    assert updates and all(n.startswith("encoder.vlm.") for n in updates)
    with pytest.raises(MFuserError, match="tuning 'lora' is to change the 'vlm'"):
        build_model("lone", tiny, tuning={"name": "lora", "encoders": ["vlm"]})
    assert build_model("lone", tiny, tuning="lora").spec.tuning is not None


def test_errors_name_encoder_and_option(tiny) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MFuserError, match="tuning 'lora' of the vfm: layers: 'atn' fits no"):
        build_model("lone", tiny, tuning={"name": "lora", "layers": ["atn"]})


def test_checkpoints_hold_the_updates(tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = {"tuning": {"name": "lora", "rank": 2}}
    tuned = build_model("plain", tiny, **options)
    randomize(tuned)
    path = tmp_path / "model.safetensors"
    meta = {"step": 1, "run": {}, "pairing": {}}
    checkpoints.write(path, checkpoints.Checkpoint(checkpoints.trained_state(tuned), {}, meta))
    fresh = build_model("plain", tiny, **options)
    images = torch.rand(1, 3, 64, 96)
    assert not torch.allclose(fresh.segment(images), tuned.segment(images))
    checkpoints.restore(fresh, checkpoints.read(path), path)
    assert torch.equal(fresh.segment(images), tuned.segment(images))


FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 2, 1)},
    "hiera_tiny_224": {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 3, 1)},
    "cait_xxs24_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "xcit_nano_12_p16_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}


def families() -> Iterator[tuple[str, VisionBackbone]]:
    yield from ((which, backbone(which)) for which in BACKBONES)
    for model, options in FAMILIES.items():
        table = {"name": "timm", "model": model, "weights": "random", "options": options}
        yield model, components("vision")["timm"](**table).build((224, 224))  # type: ignore[attr-defined]
    for kind in ("vision", "vision_language"):
        for name in ("transformers", "dual_encoder"):
            if name in components(kind):
                spec = components(kind)[name]
                yield name, spec(**{"name": name, **spec.tiny}).build((224, 224))  # type: ignore[attr-defined]


@torch.no_grad()
def test_declared_modules_are_the_blocks_that_run() -> None:
    pytest.importorskip("transformers")
    for name, tower in families():
        called: list[nn.Module] = []
        modules = tower.block_modules()
        assert len(modules) == len(set(modules)) == tower.depth > 0, name
        for module in modules:
            module.register_forward_pre_hook(lambda m, _, to=called: to.append(m))
        run(tower, torch.rand(1, 3, *tower.image_size))
        assert called == modules, name


class Undeclared(VisionBackbone):
    embed_dim, depth, num_prefix_tokens = 8, 1, 0
    resize = embed = block = finish = lambda *_: None  # type: ignore[assignment]


def test_backbones_that_declare_no_blocks_are_refused() -> None:
    with pytest.raises(MFuserError, match="Undeclared does not say which module.*block_modules"):
        LoraSpec(rank=2).build(Undeclared())
