"""Half precision: what is lowered and what is not, and what a model then computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfuser import DGSSModel, Registry, VisionBackbone, build_model, half, load_registry
from mfuser.engine import checkpoints
from mfuser.engine.checkpoints import Checkpoint
from mfuser.errors import CheckpointError
from mfuser.model.assembly import sketch
from mfuser.model.precision import frozen_bytes, lower, matrices
from mfuser.reporting.describe import describe, render

HALF = torch.bfloat16
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 2},
    "rein": {"name": "rein", "tokens": 4, "rank": 2},
    "bias": {"name": "bias"},
    "layer_norm_only": {"name": "layer_norm_only"},
    "full": {"name": "full", "blocks": [1, 2]},
}
TOWERS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "eva02_tiny_patch14_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "beitv2_base_patch16_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext_atto": {"dims": [8, 16, 32, 32], "depths": [1, 1, 2, 1]},
}


@pytest.fixture
def model(tiny: Registry) -> DGSSModel:
    return build_model("tiny", tiny)


def kinds(module: torch.nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters()}


def losses(model: DGSSModel) -> dict[str, float]:
    """Of a step, whose gradients stay; the same points and the same dropout each time."""
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96))
    found = model.train()(images, labels)
    torch.stack(list(found.values())).sum().backward()
    return {name: float(value.detach()) for name, value in found.items()}


def test_frozen_matrices_take_half_the_memory(model: DGSSModel) -> None:
    before, expected = frozen_bytes(model), frozen_bytes(model, HALF)
    lower(model, HALF)
    assert frozen_bytes(model) == expected < 0.55 * before
    for tower in model.encoder.backbones.values():
        assert tower.lowered == HALF and {p.dtype for p in matrices(tower)} == {HALF}
        assert kinds(tower) == {HALF, torch.float32}  # norms, biases, positions
        assert {b.dtype for b in tower.buffers() if b.is_floating_point()} <= {torch.float32}
    for part in (model.encoder.adapters, model.enhancer, model.decoder, model.pyramid):
        assert part is not None and kinds(part) <= {torch.float32}


def test_a_step_is_that_of_single_precision_but_for_rounding(model: DGSSModel) -> None:
    single = losses(model)
    model.zero_grad()
    lower(model, HALF)
    half = losses(model)
    assert half == pytest.approx(single, rel=0.02) and half != single
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) or parameter.requires_grad, name
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name


@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_trains_inside_an_encoder_stays_single(tiny: Registry, tuning: str) -> None:
    model = build_model("tiny", tiny, tuning=TUNINGS[tuning])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    lower(model, HALF)
    losses(model)
    for name, parameter in model.named_parameters():
        assert (name in trained) == parameter.requires_grad
        if name in trained:
            assert parameter.dtype == torch.float32, name
    inside = [p for n, p in model.named_parameters() if n in trained and ".v" in n]
    moved = [p for p in inside if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert len(moved) > len(inside) / 3  # LoRA's second factors start at zero


def run(tower: VisionBackbone, images: Tensor) -> list[Tensor]:
    stream = tower.embed(tower.normalize(images))
    found = [stream.tokens]
    for i in range(tower.depth):
        found.append(tower.step(i, found[-1], stream.state))
    return [*found, tower.within(tower.finish, found[-1], stream.state)]


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_every_making(tiny: Registry, name: str) -> None:
    given = {"name": "timm", "model": name, "weights": "random", "options": TOWERS[name]}
    model = build_model("lone", tiny, vfm=given, image_size=64)
    tower, images = model.encoder.backbones["vfm"], torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        single = run(tower, images)
        lower(model, HALF)
        half = run(tower, images)
    for got, expected in zip(half, single, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    assert any(not torch.equal(*pair) for pair in zip(half, single, strict=True))


def test_every_way_of_asking(model: DGSSModel) -> None:
    ways = [
        lambda m: m.to(HALF),
        lambda m: m.to(dtype=HALF),
        lambda m: m.to("cpu", HALF),
        lambda m: m.to(torch.zeros(1, dtype=HALF)),
        lambda m: m.bfloat16(),
    ]
    image = torch.rand(3, 64, 96)
    wanted = model.segment(image)
    results = []
    for way in ways:
        lowered = way(copy.deepcopy(model))
        assert isinstance(lowered, DGSSModel)
        assert lowered.encoder.backbones["vfm"].lowered == HALF
        assert kinds(lowered.decoder) == {torch.float32}
        results.append(copy.deepcopy(lowered).segment(image))
    assert all(torch.equal(results[0], other) for other in results)
    assert not torch.equal(results[0], wanted)
    half = copy.deepcopy(model).half()
    assert half.encoder.backbones["vlm"].lowered == torch.float16
    single = half.float()
    assert single.encoder.backbones["vlm"].lowered is None and kinds(single) == {torch.float32}
    assert single.segment(image).dtype == torch.float32
    assert model.to(torch.bfloat16).double().segment(image).dtype == torch.float64


def test_other_modules_are_left_to_torch(model: DGSSModel) -> None:
    """Inside another module the whole model is converted, and works all the same."""
    torch.nn.Sequential(model).to(HALF)
    assert kinds(model) == {HALF} and model.encoder.backbones["vfm"].lowered is None
    assert model.segment(torch.rand(3, 64, 96)).isfinite().all()


def test_what_trained_inside_an_encoder_is_lowered_for_inference(tiny: Registry) -> None:
    model = build_model("lone", tiny, vfm={"freeze": False})
    lower(model, HALF)
    assert kinds(model) == {torch.float32}
    assert HALF in kinds(model.to(HALF).encoder.backbones["vfm"])


def test_a_tower_with_a_precision_of_its_own_keeps_it(tiny: Registry) -> None:
    model = build_model("tiny", tiny, vfm={"dtype": "bfloat16"})
    lower(model, HALF)
    vfm, vlm = model.encoder.backbones["vfm"], model.encoder.backbones["vlm"]
    assert vfm.lowered is None and vlm.lowered == HALF
    assert model.segment(torch.rand(3, 64, 96)).isfinite().all()


def test_a_checkpoint_knows_its_encoders_in_any_precision(
    model: DGSSModel, tiny: Registry, tmp_path: Path
) -> None:
    exact = checkpoints.frozen_fingerprint(model)
    lower(model, HALF)
    assert checkpoints.frozen_fingerprint(model) == exact
    assert checkpoints.frozen_fingerprint(copy.deepcopy(model)) == exact
    state = checkpoints.trained_state(model)
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    meta = {"pairing": {}, "run": {}, "step": 1, "frozen": exact}
    checkpoints.restore(model, Checkpoint(state, {}, meta), tmp_path)
    checkpoints.restore(build_model("tiny", tiny), Checkpoint(state, {}, meta), tmp_path)
    other = build_model("tiny", tiny, seed=1)
    lower(other, HALF)
    with pytest.raises(CheckpointError, match="the frozen weights of its vfm are not those"):
        checkpoints.restore(other, Checkpoint(state, {}, meta), tmp_path)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that autograd saves, one entry per tensor."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize("lowered", [False, True])
def test_there_is_no_graph_before_the_first_trained_module(model: DGSSModel, lowered: bool) -> None:
    if lowered:
        lower(model, HALF)
    seen: list[int] = []

    def look(adapter: torch.nn.Module, given: tuple[Any, ...]) -> None:
        assert not any(tokens.requires_grad for tokens in given[:2]) or seen
        seen.append(len(saved))

    for adapter in model.encoder.adapters.values():
        adapter.register_forward_pre_hook(look)
    with counted() as saved:
        output = model.train()(torch.rand(1, 3, 64, 96))
    assert seen[0] == 0 < seen[1] < len(saved)
    output.decoder.masks[-1].sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_weights_of_the_papers_pairing_are_halved() -> None:
    """On the meta device: 733 million frozen parameters."""
    model = sketch(load_registry().pairing("dinov2-l_eva02-clip-l"))
    single, half = frozen_bytes(model), frozen_bytes(model, HALF)
    assert 2.93e9 < single < 2.94e9 and half < 0.51 * single
    lower(model, HALF)
    assert frozen_bytes(model) == half


def test_describe_says_what_lowering_saves(tiny: Registry) -> None:
    facts = describe(tiny.pairing("plain"))
    single, half = facts["frozen weights"].values()
    assert 0.5 * single < half < 0.55 * single
    line = f"{single:.2f} GiB as they are, {half:.2f} with matrices in bfloat16"
    assert any(line in str(text) for text in render("", facts))


def test_seven_billion_parameters_step_on_the_meta_device() -> None:
    model = sketch(load_registry().pairing("rein-dinov3-7b"))
    assert 13e9 < frozen_bytes(model) < 14e9
    trained = [p for p in model.parameters() if p.requires_grad]
    size = (1, 3, *model.spec.image_size)
    output = model.train()(torch.empty(size, device="meta"))
    sum(m.sum() + c.sum() for m, c in _predictions(output.decoder)).backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def _predictions(output: Any) -> list[tuple[Tensor, Tensor]]:
    return list(zip(output.masks, output.classes, strict=True))


def test_attention_of_a_batch_multiplies_whole_sequences() -> None:
    """Not row by row, each with a copy of the weight, as torch does with a frozen one."""
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    attention.in_proj_weight.data = attention.in_proj_weight.data.to(HALF)
    attention.out_proj.weight.data = attention.out_proj.weight.data.to(HALF)
    tokens = torch.rand(2, 5, 8, requires_grad=True)
    with torch.profiler.profile() as seen, half.multiplying("cpu", HALF):
        attention(tokens, tokens, tokens, need_weights=False)
    assert not any(event.key == "aten::bmm" for event in seen.key_averages())


def test_what_a_part_returns_by_mistake_is_left_to_its_contract() -> None:
    """Which names the part, whatever is held in half precision."""
    given = (torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.int64), None)
    first, second, third = half.single(given)
    assert first.dtype == torch.float32 and second is given[1] and third is None
