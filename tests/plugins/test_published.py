"""Pairings of published methods: what trains in them, and that it learns.

Reduced: the registry's own pairing on towers of two blocks, so that what is tried is what ships.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import clip

from mfuser import PairingSpec, build_model, load_registry
from mfuser.config.registry import Registry
from mfuser.engine.optimizer import parameter_groups
from mfuser.model.assembly import sketch

TOWER = {"options": {"embed_dim": 32, "depth": 2, "num_heads": 2}, "weights": "random"}
CLIP = clip(32)
DECODER = {
    "width": 32,
    "pixel_layers": 1,
    "pixel_ffn": 32,
    "layers": 1,
    "ffn": 32,
    "num_points": 64,
}

TUNED = {
    # Counted from the authors' configurations; Rein's paper says 3 M.
    "rein-dinov2-l": 2_990_081,
    "soma-dinov2-l": 4_866_048,
    "recyclelora-dinov2-l": 14_155_776,
}


@pytest.fixture(scope="module")
def shipped() -> Registry:
    return load_registry()


@pytest.mark.parametrize("name", TUNED)
def test_published_numbers_of_trained_parameters(shipped: Registry, name: str) -> None:
    model = sketch(shipped.pairing(name))
    trained = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    assert trained == TUNED[name]
    assert not [p for p in model.pyramid.parameters()]


def reduced(shipped: Registry, name: str) -> PairingSpec:
    """The pairing on small towers: the options of its tuning as they are, but its sizes."""
    spec = shipped.pairing(name)
    changes: dict[str, Any] = {"image_size": [64, 64], "decoder": dict(DECODER)}
    if spec.vfm is not None:
        changes["vfm"] = {"name": "timm", "model": "vit_tiny_patch16_224", **TOWER}
        if getattr(spec.vfm, "dtype", "float32") != "float32":
            changes["vfm"]["dtype"] = spec.vfm.dtype  # type: ignore[union-attr]
    if spec.vlm is not None:
        changes |= {"vlm": CLIP, "prompt": {"context": 2}, "pyramid": {"width": 32}}
    if spec.decoder.name == "mask2former":
        changes["decoder"]["queries"] = 20
    if spec.fusion.name == "mvfuser":
        changes["fusion"] = {"state_size": 2}
        changes["enhancer"] = {"width": 16}
    sizes = {"tokens": 20, "rank": 6, "second_rank": 2, "blocks": [1, 2]}
    assert spec.tuning is not None
    given = {key: value for key, value in sizes.items() if getattr(spec.tuning, key, None)}
    return shipped.pairing(name, {**changes, "tuning": given})


@pytest.mark.parametrize(
    "name",
    [*TUNED, "rein-dinov3-7b", "fada-dinov2-l", "tqdm-eva02-l", "dinov3-l_siglip2-l_soma"],
)
def test_learns_in_twenty_steps(shipped: Registry, name: str) -> None:
    model = build_model(reduced(shipped, name))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    assert any(n.startswith("encoder.v") for n in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    if name.endswith("7b"):
        halves = [n for n, p in frozen.items() if p.dtype == torch.bfloat16]
        assert halves and all(n.startswith("encoder.vfm.") for n in halves)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-3)
    images, labels = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, 32:] = 5
    model.train()
    totals = []
    for _ in range(20):
        losses = torch.stack(list(model(images, labels).values())).sum()
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        totals.append(float(losses.detach()))
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in frozen.items())


def test_rates_and_decays_of_the_two_adapters(shipped: Registry) -> None:
    model = build_model(reduced(shipped, "recyclelora-dinov2-l"))
    names = {p: n for n, p in model.named_parameters()}
    groups = parameter_groups(model, shipped.recipe("recyclelora"))
    found = {
        part: {
            (group["factor"], group["decay"])
            for group in groups
            for parameter in group["params"]  # type: ignore[attr-defined]
            if part in names[parameter]
        }
        for part in (".main.", ".second.", "decoder.cls_embed")
    }
    assert found == {".main.": {(1, 0)}, ".second.": {(0.5, 0)}, "decoder.cls_embed": {(1, 0.05)}}


def test_what_links_tokens_to_queries_belongs_to_the_tuning(shipped: Registry) -> None:
    model = build_model(reduced(shipped, "rein-dinov2-l"))
    backbone = model.encoder.backbones["vfm"]
    assert backbone.tuned == {n for n, p in backbone.named_parameters() if p.requires_grad}
