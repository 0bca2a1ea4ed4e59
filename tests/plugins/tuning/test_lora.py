from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mfuser import DGSSModel, MFuserError, VisionBackbone, build_model, components
from mfuser.engine import checkpoints
from mfuser.model.assembly import sketch
from mfuser.model.merging import merge_tuning
from mfuser_plugins.tuning.lora import LoraSpec, LowRank

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
INITS: dict[str, dict[str, Any]] = {
    "svd_minor": {"rank": 3, "init": "svd_minor"},
    "svd_minor, split": {"rank": 3, "alpha": 6.0, "init": "svd_minor", "split": True},
    "rrqr": {"rank": 6, "alpha": 1.0, "init": "rrqr", "second_rank": 2},
    "split": {"rank": 3, "split": True, "biases": True},
}


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
    merged = merge_tuning(copy.deepcopy(tower))
    assert isinstance(merged, VisionBackbone)
    torch.testing.assert_close(run(merged, images), tuned)
    assert set(merged.state_dict()) == names and not trained(merged)


@EVERY
def test_every_start_is_the_encoder_and_folds_into_it(which: str) -> None:
    images = torch.rand(1, 3, *SIZE)
    for options in INITS.values():
        tower = backbone(which)
        before = run(tower, images)
        LoraSpec(**options).build(tower)
        torch.testing.assert_close(run(tower, images), before, rtol=1e-5, atol=1e-5)
        randomize(tower)
        tuned = run(tower, images)
        assert (tuned - before).abs().max() > 1e-3 * before.abs().max()
        merged = merge_tuning(copy.deepcopy(tower))
        assert not any("parametrizations" in name for name in merged.state_dict())
        torch.testing.assert_close(run(merged, images), tuned, rtol=1e-5, atol=1e-5)


def weights(tower: VisionBackbone, layer: str) -> tuple[Tensor, Any]:
    """The frozen weight of a layer in the first block, and its update."""
    chain = tower.block_modules()[0].get_submodule(layer).parametrizations.weight  # type: ignore[union-attr]
    return chain.original.detach(), chain[0]


def test_the_minor_singular_components_train() -> None:
    """Without the update's product, what is left of the weight is its major components."""
    tower = backbone("timm")
    LoraSpec(rank=4, init="svd_minor", alpha=2.0).build(tower)
    for layer in ("attn.proj", "mlp.fc1"):
        weight, update = weights(tower, layer)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        minor = u[:, -4:] * s[-4:] @ vh[-4:]
        product = update.scale * (update.up @ update.down).detach()
        torch.testing.assert_close(product, minor, rtol=1e-4, atol=1e-5)
        assert torch.equal(update(weight), weight)
        with torch.no_grad():
            update.up.zero_()
        torch.testing.assert_close(update(weight), weight - minor, rtol=1e-4, atol=1e-5)


def test_query_key_and_value_have_components_of_their_own() -> None:
    tower = backbone("timm")
    LoraSpec(rank=4, init="svd_minor", split=True).build(tower)
    weight, update = weights(tower, "attn.qkv")
    assert update.up.shape == (96, 4) and update.down.shape == (12, 32)
    product = update._product(update.up, update.down).detach()
    for share, part in zip(weight.chunk(3), product.chunk(3), strict=True):
        u, s, vh = torch.linalg.svd(share)
        torch.testing.assert_close(part, u[:, -4:] * s[-4:] @ vh[-4:], rtol=1e-4, atol=1e-5)


def test_the_adapters_of_rrqr_start_on_minor_and_major_directions() -> None:
    tower = backbone("timm")
    LoraSpec(rank=8, init="rrqr", second_rank=3, alpha=1.0).build(tower)
    weight, update = weights(tower, "mlp.fc2")
    main, second = update.main, update.second
    assert main.up.shape == (32, 5) and second.up.shape == (32, 3)
    assert main.scale == second.scale == 1 / 8
    up = torch.cat([second.up, main.up], 1).detach()
    torch.testing.assert_close(up.T @ up, torch.eye(8), rtol=0, atol=1e-5)
    # One input each, none twice; the first has the longest column of all.
    down = torch.cat([second.down, main.down]).detach()
    assert set(down.sum(1).tolist()) == {1.0} and down.sum(0).max() == 1
    assert down[0].argmax() == weight.norm(dim=0).argmax()
    assert torch.equal(update(weight), weight)


def test_chosen_blocks_and_their_biases() -> None:
    for which, biases in (("timm", 4), ("eva", 5), ("open_clip", 4)):
        tower = backbone(which)
        LoraSpec(rank=2, blocks=(1, 2), biases=True).build(tower)
        names = trained(tower)
        assert all(".1." in name or "blocks.1" in name for name in names), names
        # EVA has two biases, of query and value, in place of one.
        assert sum("parametrizations" not in name for name in names) == biases, names
        run(tower, torch.rand(1, 3, *SIZE)).square().sum().backward()
        missing = [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 3)}, r"blocks \[1, 3\] go beyond the 2 that there are"),
        ({"init": "svd_minor", "rank": 33}, "rank 33 is more than layer 'attn.qkv' has, 32"),
        ({"blocks": (1, 1)}, r"blocks \[1, 1\] are none"),
        ({"init": "rrqr"}, "second_rank go together"),
        ({"second_rank": 2}, "second_rank go together"),
        ({"init": "rrqr", "second_rank": 16}, "leaves nothing of rank 16"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises((MFuserError, ValidationError), match=message):
        LoraSpec(**options).build(backbone("timm"))


def test_half_precision_towers_have_updates_in_single() -> None:
    for options in INITS.values():
        tower = backbone("timm").bfloat16()
        LoraSpec(**options).build(tower)
        updates = [p for n, p in tower.named_parameters() if "parametrizations.weight.0" in n]
        assert updates and {p.dtype for p in updates} == {torch.float32}
        assert run(tower, torch.rand(1, 3, *SIZE).bfloat16()).dtype == torch.bfloat16


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
    update = LowRank(weight, rank=2, scale=4.0)
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
        LoraSpec(layers=("query",)).build(backbone("open_clip"))


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
    merge_tuning(model)
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


@pytest.mark.parametrize("init", ["svd_minor", "rrqr"])
def test_checkpoints_need_no_equal_factorization(tiny, tmp_path: Path, init: str) -> None:  # type: ignore[no-untyped-def]
    """Signs and last bits of a factorization differ between machines: what was trained does not."""
    table = {"name": "lora", "rank": 3, "init": init}
    if init == "rrqr":
        table |= {"second_rank": 1}
    tuned = build_model("plain", tiny, tuning=table)
    randomize(tuned)
    path = tmp_path / "model.safetensors"
    meta = {"step": 1, "run": {}, "pairing": {}, "frozen": checkpoints.frozen_fingerprint(tuned)}
    checkpoints.write(path, checkpoints.Checkpoint(checkpoints.trained_state(tuned), {}, meta))
    plain = build_model("plain", tiny)
    fresh = build_model("plain", tiny, tuning=table)
    # The frozen weights are those that were loaded, not residuals.
    originals = {n: p for n, p in fresh.named_parameters() if n.endswith(".original")}
    for name, parameter in plain.named_parameters():
        tuned_name = name.replace(".weight", ".parametrizations.weight.original")
        assert tuned_name not in originals or torch.equal(originals[tuned_name], parameter)
    with torch.no_grad():
        for part in fresh.modules():
            if isinstance(part, LowRank):
                for tensor in (part.up, part.down, part.up_start, part.down_start):
                    tensor.neg_().mul_(1.001)  # type: ignore[union-attr]
    images = torch.rand(1, 3, 64, 96)
    checkpoints.restore(fresh, checkpoints.read(path), path)
    assert torch.equal(fresh.segment(images), tuned.segment(images))


def test_laid_out_without_values(tiny) -> None:  # type: ignore[no-untyped-def]
    for options in INITS.values():
        spec = tiny.pairing("plain", {"tuning": {"name": "lora", **options}})
        laid_out, real = sketch(spec), build_model(spec)
        shapes = {n: p.shape for n, p in real.state_dict().items()}
        assert {n: p.shape for n, p in laid_out.state_dict().items()} == shapes


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
