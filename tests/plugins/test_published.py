"""Pairings of published methods: what trains in them, that it learns, and that nothing changed.

Reduced: the registry's own pairing on towers of three blocks, so that what is tried is what ships.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pairings import computed, reduced

from mfuser import build_model, load_registry
from mfuser.config.registry import Registry
from mfuser.engine.optimizer import parameter_groups
from mfuser.model.assembly import sketch

TUNED = {
    # Counted from the authors' configurations; Rein's paper says 3 M.
    "rein-dinov2-l": 2_990_081,
    "soma-dinov2-l": 4_866_048,
    "recyclelora-dinov2-l": 14_155_776,
    "fada-dinov2-l": 2_045_441,
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


def test_published_size_of_eomt(shipped: Registry) -> None:
    """Tower and head, against transformers' port of it with DINOv3-L, to 1 %."""
    model = sketch(shipped.pairing("eomt-dinov3-l"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == pytest.approx(314_813_460, rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        *(*TUNED, "rein-dinov3-l", "rein-dinov3-7b", "tqdm-eva02-l"),
        *("eomt-dinov3-l", "vfmnet-dinov2-l", "vireo-dinov2-l", "dinov3-l_siglip2-l_soma"),
    ],
)
def test_learns_in_twenty_steps(shipped: Registry, name: str) -> None:
    model = build_model(reduced(shipped, name))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    assert any(n.startswith("encoder.v") for n in trained) != name.startswith("vireo")
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


BEFORE = json.loads((Path(__file__).parents[1] / "golden" / "pairings.json").read_text("utf-8"))


@pytest.mark.parametrize("name", BEFORE)
def test_computes_what_it_did(shipped: Registry, name: str) -> None:
    """Losses and gradients of a crop, against those of the commits that the file names."""
    found = computed(build_model(reduced(shipped, name)))
    for key in ("losses", "gradients"):
        assert found[key] == pytest.approx(BEFORE[name][key], rel=1e-3), key


def test_every_pairing_is_compared(shipped: Registry) -> None:
    assert set(BEFORE) == set(shipped.names("pairing"))


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
