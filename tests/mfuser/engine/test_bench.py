"""The cost of a pairing by part: the parts add up, and agree with what is known of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mfuser import load_registry
from mfuser.engine.stopwatch import OTHER, Stopwatch, watch_model
from mfuser.model.assembly import build_model
from mfuser.reporting.bench import Bench

RECIPE = ("--recipe", "tiny", "--device", "cpu", "--repeats", "2")


def test_the_parts_of_a_step(write_registry, inside: Path, mfuser) -> None:  # type: ignore[no-untyped-def]
    write_registry("")
    ran = mfuser("bench", "plain", *RECIPE, "--frame", "96", "128", "--out", "b", "--json")
    assert ran.code == 0, ran.err
    found = Bench.model_validate_json(ran.out)
    assert json.loads((inside / "b" / "bench.json").read_text("utf-8")) == json.loads(ran.out)
    assert (inside / "b" / "bench.png").is_file()
    model = build_model(load_registry(inside / "registry.toml").pairing("plain"))
    by = {p.part: p for p in found.parts}
    assert {"vfm", "vlm", "text tower", "enhancer", "pyramid", "losses", OTHER} <= set(by)
    total = sum(p.forward + p.backward for p in found.parts) + found.optimizer
    assert total == pytest.approx(found.seconds, rel=0.01)
    assert all(p.forward >= 0 and p.backward >= 0 for p in found.parts)
    assert sum(p.trained for p in found.parts) <= sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert by["vfm"].trained == 0 and by["vfm"].flops > 0
    assert found.inference is not None and found.inference.released is not None
    assert by["vfm"].inference is not None and by["vfm"].inference > 0
    assert found.dry_run.hours >= found.seconds * found.dry_run.steps / 3600
    shown = mfuser("bench", "plain", *RECIPE)
    assert shown.code == 0 and "peak of the device" in shown.out and "optimizer" in shown.out


def test_gradients_pass_the_marks_unchanged_and_set_the_clock(write_registry, inside: Path) -> None:  # type: ignore[no-untyped-def]
    registry = load_registry(write_registry(""))
    images = torch.rand(1, 3, *registry.pairing("plain").image_size)
    labels = torch.zeros(1, *images.shape[2:], dtype=torch.long)
    found = []
    for watched in (False, True):
        model = build_model("plain", registry).train()
        watch = Stopwatch(torch.device("cpu"))
        if watched:
            watch_model(model, watch)
        torch.manual_seed(0)
        with watch.during("forward"):
            total = torch.stack(list(model(images, labels).values())).sum()
        with watch.during("backward"):
            total.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        assert gradient is not None and torch.equal(gradient, found[1][name]), name
    backward = {part for (phase, part), s in watch.seconds.items() if phase == "backward" and s > 0}
    assert {"pyramid", "losses"} <= backward


def test_activations_count_as_in_describe() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch.counting(), watch.during("forward"):
        torch.nn.functional.gelu(torch.rand(3, 5))
    assert watch.flops["forward", OTHER] == 15


def test_what_cannot_be_measured_is_refused(write_registry, inside: Path, mfuser) -> None:  # type: ignore[no-untyped-def]
    write_registry("")
    for arguments, said in (
        (["plain", *RECIPE, "--frame", "8", "8"], "is below the window"),
        (["plian", *RECIPE], "did you mean 'plain'"),
    ):
        ran = mfuser("bench", *arguments)
        assert ran.code == 2 and said in ran.err, ran.err
