"""Losses that stay on the device, as they do on a GPU: nothing waits for them, and one that is not
finite moves no weight although nobody has looked at it yet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from stopping import interrupted_in
from torch.utils._python_dispatch import TorchDispatchMode

from mfuser import Registry, build_model
from mfuser.data.images import UnreadableImage
from mfuser.engine import checkpoints
from mfuser.engine.diagnose import DIVERGED
from mfuser.engine.pending import Losses
from mfuser.engine.train import Diverged, Trainer, train
from mfuser.model.dgss import DGSSModel

WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "lift_fresh", "equal"}
"""Operators whose result a GPU is waited for: a number, a length that depends on values, a list
that is copied there."""


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        places = args[1] if name.startswith("index") and len(args) > 1 else ()
        masked = any(
            isinstance(p, torch.Tensor) and p.dtype == torch.bool
            for p in (places if isinstance(places, list | tuple) else ())
        )
        if name in WAITS or masked:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfuser.engine.train.deferrable", lambda *_: True)


def waits_of_steps(tiny: Registry, run: Any, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The waits of each step, and how many steps' losses were fetched at a time."""
    step, fetch = Trainer._step, Losses.fetch
    waits: list[dict[str, int]] = []
    fetched: list[int] = []

    def counted(self: Trainer, number: int, batches: Any) -> Any:
        with Waits() as mode:
            found = step(self, number, batches)
        waits.append(dict(mode.found))
        return found

    def watched(self: Losses, asked: bool) -> Any:
        found = fetch(self, asked)
        fetched.append(len(found[0]))
        return found

    with patch.context() as inner:
        inner.setattr(Trainer, "_step", counted)
        inner.setattr(Losses, "fetch", watched)
        train(tiny, run, folder)
    return waits, fetched


def test_a_step_waits_once(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deferred: None
) -> None:
    run = begin("tiny", "save_every=100", "clip_grad=1", "ema={}", "steps=3")
    waits, fetched = waits_of_steps(tiny, run, tmp_path / "r", monkeypatch)
    assert waits == [{"nonzero": 1}] * 3  # how many classes the batch shows
    assert fetched == [1, 2]
    # What is counted is there where losses are fetched at once.
    monkeypatch.setattr("mfuser.engine.train.deferrable", lambda *_: False)
    eager = begin("plain", "steps=1", "warmup=0")
    waits, fetched = waits_of_steps(tiny, eager, tmp_path / "eager", monkeypatch)
    assert waits[0]["_local_scalar_dense"] >= 2 and fetched == [1]


Weights = dict[str, torch.Tensor]


def weights(folder: Path) -> Weights:
    return checkpoints.read(folder / checkpoints.FINAL).model


def learned_alike(one: Weights, other: Weights, registry: Registry) -> bool:
    """Whether two trainings of `plain` went the same way: by another kernel of the optimizer all
    but the last digits are the same, save where a gradient is nearly 0."""
    model = build_model("plain", registry)
    start = checkpoints.trained_state(model)
    names = [n for n, _ in model.named_parameters() if n in start]  # not the norms' statistics

    def apart(a: Weights, b: Weights) -> float:
        return float(sum((a[n].double() - b[n].double()).square().sum() for n in names)) ** 0.5

    return apart(one, other) < 0.02 * apart(one, start)


def test_deferred_steps_learn_the_same_and_resume_to_the_bit(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin("plain", "steps=5", "save_every=100", "ema={}")
    train(tiny, run, tmp_path / "eager")
    monkeypatch.setattr("mfuser.engine.train.deferrable", lambda *_: True)
    train(tiny, run, tmp_path / "whole")
    with interrupted_in(3):
        train(tiny, run, tmp_path / "parts")
    train(tiny, run, tmp_path / "parts", resume=True)
    eager, whole, parts = (weights(tmp_path / n) for n in ("eager", "whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert learned_alike(eager, whole, tiny)
    lines = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("eager", "whole")]
    assert len(lines[0]) == len(lines[1]) == 2


def losing(losses: Any) -> Any:
    """The model's losses; in step 3 of 6, and in no other, not a number."""

    def lost(self: DGSSModel, *args: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = losses(self, *args)
        if self.decoder.progress == 2 / 6:
            found["loss_ce"] = found["loss_ce"] * float("nan")
        return found

    return lost


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DGSSModel, "losses", losing(DGSSModel.losses))


def test_the_first_bad_step_is_named_and_moves_nothing(
    tiny: Registry,
    begin: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: None,
) -> None:
    run = begin("plain", "steps=6", "save_every=100")
    said, saved = [], []
    for name in ("eager", "deferred"):
        monkeypatch.setattr("mfuser.engine.train.deferrable", lambda *_, n=name: n == "deferred")
        with pytest.raises(Diverged) as caught:
            train(tiny, run, tmp_path / name)
        said.append(str(caught.value).replace(name, "r"))
        saved.append(checkpoints.read(tmp_path / name / DIVERGED))
        assert not (tmp_path / name / checkpoints.LAST).exists()
    assert said[0] == said[1] and "the loss is nan at step 3 (loss_ce)" in said[0]
    one, other = saved
    assert one.meta["names"] == other.meta["names"] and other.meta["step"] == 2
    assert learned_alike(one.model, other.model, tiny)


def test_nothing_is_saved_after_it(
    tiny: Registry,
    begin: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deferred: None,
    broken: None,
) -> None:
    """Not by what goes wrong before anybody looks, either."""
    fetch = Trainer._fetch

    def unreadable(self: Trainer, step: int, *rest: Any) -> Any:
        with self._saving(step):
            if step == 4:
                raise UnreadableImage("street.png cannot be read")
        return fetch(self, step, *rest)

    monkeypatch.setattr(Trainer, "_fetch", unreadable)
    with pytest.raises(Diverged, match="at step 3 "):
        train(tiny, begin("plain", "steps=6", "save_every=100"), tmp_path / "r")
    assert not (tmp_path / "r" / checkpoints.LAST).exists()


def test_several_processes_leave_out_the_same_step(write_registry: Any, tmp_path: Path) -> None:
    """The second of two loses its loss; the first would go on by gradients that are lost, too."""

    def prepare(rank: int) -> None:
        patch = pytest.MonkeyPatch()  # of this process, which ends with it
        patch.setattr("mfuser.engine.train.deferrable", lambda *_: True)
        if rank == 1:
            patch.setattr(DGSSModel, "losses", losing(DGSSModel.losses))

    changes = ("--set-recipe", "steps=6", "--set-recipe", "save_every=100", "--no-evaluate")
    command = ("train", "plain", "--recipe", "tiny", "--device", "cpu", *changes)
    given = ("--registry", write_registry(), "--out", tmp_path / "r")
    ended = launch([*command, *given], tmp_path, prepare=prepare)
    assert [e.code for e in ended] == [2, 2], ended
    assert "the loss is nan at step 3 (loss_ce)" in ended[1].err
    lost = checkpoints.read(tmp_path / "r" / DIVERGED)
    assert (lost.meta["rank"], lost.meta["step"]) == (1, 2)
    assert all(t.isfinite().all() for t in lost.model.values())
    assert not (tmp_path / "r" / checkpoints.LAST).exists()
