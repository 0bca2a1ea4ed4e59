"""Averaged weights: what they are, that a kill changes no bit of them, and who takes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import gone_in

from mfuser import MFuserError, Registry
from mfuser.engine import checkpoints
from mfuser.engine.averaging import Averages, as_saved
from mfuser.engine.checkpoints import AVERAGED, FINAL, LAST, load_model
from mfuser.engine.processes import processes
from mfuser.engine.train import Trainer, train
from mfuser.errors import CheckpointError

EMA = ("steps=6", "save_every=2", "ema.decay=0.8", "ema.warmup=1")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def seen() -> list[dict[str, torch.Tensor]]:
    """The weights after every step of the run of `averaged`."""
    return []


@pytest.fixture(scope="module")
def averaged(
    tiny: Registry, seen: list[dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from mfuser.config.run import RunSpec

    original = Trainer._step

    def stepped(self: Trainer, number: int, batches: Any) -> Any:
        losses = original(self, number, batches)
        seen.append({n: t.clone() for n, t in checkpoints.trained_state(self.model).items()})
        return losses

    folder = tmp_path_factory.mktemp("averaged") / "run"
    recipe = tiny.recipe("tiny", EMA)
    run = RunSpec.of(tiny, "plain", "tiny", pairing=tiny.pairing("plain"), recipe=recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stepped)
        train(tiny, run, folder)
    return folder


def test_what_the_averages_are(averaged: Path, seen: list[dict[str, torch.Tensor]]) -> None:
    """Against the definition, with numbers of float64."""
    found = checkpoints.read(averaged / AVERAGED)
    assert found.meta["weights"] == {"kind": "averaged"} and found.step == 6
    last = checkpoints.read(averaged / FINAL).model
    assert same(last, seen[-1]) and not same(last, found.model)
    for name, value in found.model.items():
        expected = seen[0][name].double()  # the warm-up's step counts for nothing
        for n, weights in enumerate(seen[1:], start=1):
            decay = min(0.8, n / (n + 10))
            expected = decay * expected + (1 - decay) * weights[name].double()
        if not value.is_floating_point():
            expected = seen[-1][name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)


def test_averaging_changes_no_weight_and_no_checkpoint_without_it(
    averaged: Path, tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    train(tiny, begin("plain", *EMA[:2]), tmp_path / "r")
    assert same(*(checkpoints.read(f / FINAL).model for f in (averaged, tmp_path / "r")))
    last = checkpoints.read(tmp_path / "r" / LAST)
    assert not last.averaged and same(last.optimizer, checkpoints.read(averaged / LAST).optimizer)
    assert not (tmp_path / "r" / AVERAGED).exists()


def test_killed_and_resumed_equals_never_stopped(
    averaged: Path, tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    with gone_in(4):
        train(tiny, begin("plain", *EMA), folder)
    assert checkpoints.read(folder / LAST).step == 2
    # What is evaluated of an unfinished run are its averages, too.
    model, checkpoint = load_model(folder, tiny)
    assert checkpoint.meta["weights"] == {"kind": "averaged"}
    assert same(checkpoints.trained_state(model), checkpoints.read(folder / LAST).averaged)
    done = train(tiny, begin("plain", *EMA), folder, resume=True)
    # What training returns is what is evaluated.
    assert done.weights == {"kind": "averaged"} and done.step == 6
    assert same(checkpoints.trained_state(done.model), checkpoints.read(averaged / AVERAGED).model)
    for name in (AVERAGED, FINAL):
        assert same(*(checkpoints.read(f / name).model for f in (averaged, folder)))
    assert same(*(checkpoints.read(f / LAST).averaged for f in (averaged, folder)))
    # Killed between the last files: what is missing is written again.
    (folder / AVERAGED).unlink()
    train(tiny, begin("plain", *EMA), folder, resume=True)
    assert same(*(checkpoints.read(f / AVERAGED).model for f in (averaged, folder)))


def test_a_checkpoint_without_averages_is_not_resumed(
    averaged: Path, tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    shutil.copytree(averaged, folder)
    whole = checkpoints.read(folder / LAST)
    whole.averaged = {}
    checkpoints.write(folder / LAST, whole)
    with pytest.raises(CheckpointError, match="holds no averaged weights to resume from"):
        train(tiny, begin("plain", *EMA), folder, resume=True)


def test_which_weights_are_taken(
    averaged: Path, trained: Path, tiny: Registry, begin: Any, mfuser: Any, write_registry: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    files = {kind: checkpoints.read(averaged / n).model for kind, n in
             (("last", FINAL), ("averaged", AVERAGED))}  # fmt: skip
    for weights, kind in ((None, "averaged"), ("averaged", "averaged"), ("last", "last")):
        model, _ = load_model(averaged, tiny, weights=weights)
        assert same(checkpoints.trained_state(model), files[kind])
    for path, weights, message in (
        (averaged, "best", "does not hold the best weights: .*validate_every"),
        (averaged / FINAL, "averaged", "model.safetensors does not hold the averaged weights"),
        (averaged / AVERAGED, "last", "averaged.safetensors does not hold the last weights"),
        (trained, "averaged", "last.safetensors does not hold the averaged weights: .*ema"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(path, tiny, weights=weights)

    registry = ("--registry", write_registry())
    lines = {}
    for weights in ("averaged", "last"):
        out = tmp_path / weights
        done = mfuser("evaluate", averaged, "--weights", weights, "--out", out, *registry)
        assert done.code == 0, done.err
        lines[weights] = json.loads((out / "report.json").read_text())["protocol"]["checkpoint"]
    assert lines["last"] == "the last one"
    assert lines["averaged"] == (
        "the last one, its weights averaged over the steps (decay 0.8)"
    )  # fmt: skip
    refused = mfuser("evaluate", trained, "--weights", "averaged", *registry)
    assert refused.code == 2 and refused.err.count("\n") == 1


def test_looking_at_the_averages_leaves_the_model_as_it_was(tiny: Registry) -> None:
    from mfuser import build_model

    model = build_model("plain", tiny).train()
    model.decoder.progress = 0.25
    averages = Averages(model, tiny.recipe("tiny", EMA).ema)  # type: ignore[arg-type]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    for value in averages.values.values():
        value.zero_()
    with processes(device="cpu") as group, as_saved(model, averages, group) as shown:
        assert all((t == 0).all() for t in shown.values()) and not model.training
        assert model.decoder.progress == 1.0
    assert model.decoder.progress == 0.25
    assert same(before, dict(model.state_dict())) and modes == [m.training for m in model.modules()]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ema.decay=1", r"ema\.decay = 1"),
        ("ema.warmup=4", "ema.warmup of 4 steps leaves none of steps = 4"),
        ("ema.decya=0.9", "did you mean 'decay'"),
    ],
)
def test_what_is_refused(tiny: Registry, setting: str, message: str) -> None:
    with pytest.raises(MFuserError, match=message):
        tiny.recipe("tiny", [setting])
