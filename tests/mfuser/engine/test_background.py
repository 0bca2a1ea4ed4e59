"""Checkpoints written beside the training: nothing waits for the disk, nothing is lost or mixed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfuser import Registry
from mfuser.engine import checkpoints, saving
from mfuser.engine.background import Background
from mfuser.engine.checkpoints import FINAL, LAST, Checkpoint
from mfuser.engine.train import Trainer, train
from mfuser.errors import CheckpointError

PATIENCE = 30.0


def watch(monkeypatch: pytest.MonkeyPatch, before: Callable[[str, int], None]) -> list[str]:
    """Calls `before(file, step)` as each file is to be written; returns what happened, in order:
    "step N" after its optimizer step, "last N" once that file is there."""
    happened: list[str] = []
    step, write = Trainer._step, checkpoints.write

    def stepped(self: Trainer, number: int, batches: Any) -> Any:
        losses = step(self, number, batches)
        happened.append(f"step {number + 1}")
        return losses

    def written(path: Path, checkpoint: Checkpoint) -> None:
        name = path.name.partition(".")[0]
        before(name, checkpoint.step)
        write(path, checkpoint)
        happened.append(f"{name} {checkpoint.step}")

    monkeypatch.setattr(Trainer, "_step", stepped)
    monkeypatch.setattr(checkpoints, "write", written)
    return happened


def test_the_next_steps_do_not_wait_and_the_next_save_does(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin("plain", "steps=6", "save_every=2", "ema={}")
    kept: dict[int, dict[str, torch.Tensor]] = {}
    take = saving.Saver._take

    def taken(self: saving.Saver, step: int, *gathered: Any) -> Any:
        found = take(self, step, *gathered)
        kept[step] = {k: v.clone() for k, v in found.state.items()}
        return found

    def before(name: str, step: int) -> None:
        until = f"step {step + 1}"
        if step < 6:  # written only once the next step is done
            for _ in range(int(PATIENCE * 100)):
                if until in happened:
                    return
                pause.wait(0.01)
            pytest.fail(f"{until} waits for the file")
        else:
            assert checkpoints.read(tmp_path / "r" / LAST).step in (4, 6)

    pause = threading.Event()
    monkeypatch.setattr(saving.Saver, "_take", taken)
    happened = watch(monkeypatch, before)
    train(tiny, run, tmp_path / "r")
    order = [entry for entry in happened if not entry.startswith("step")]
    assert order == ["last 2", "last 4", "last 6", "averaged 6", "model 6"]
    assert happened.index("step 3") < happened.index("last 2") < happened.index("step 5")
    previous = checkpoints.read(tmp_path / "r" / checkpoints.PREVIOUS)
    assert previous.step == 4  # as it was then, though step 5 had changed the weights meanwhile
    assert all(torch.equal(previous.model[k], kept[4][k]) for k in kept[4])


@pytest.mark.parametrize("when", [2, 6])
def test_a_full_disk_ends_the_run_and_keeps_the_file_before(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """Also where it is the last file of all."""

    def full(name: str, step: int) -> None:
        if step == when:
            monkeypatch.setattr(checkpoints, "save_file", no_space)

    def no_space(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    happened = watch(monkeypatch, full)
    with pytest.raises(CheckpointError, match=r"last\.safetensors cannot be written: .*No space"):
        train(tiny, begin("plain", "steps=6", "save_every=1"), tmp_path / "r")
    assert checkpoints.read(tmp_path / "r" / LAST).step == when - 1
    assert not (tmp_path / "r" / FINAL).exists()
    assert f"step {min(when + 2, 7)}" not in happened  # said at the next save
    assert not list((tmp_path / "r").glob(".*.tmp"))


def test_what_follows_a_failure_is_not_begun() -> None:
    done: list[int] = []
    work = Background()
    release = threading.Event()
    work.put(lambda: done.append(1))
    work.put(lambda: (release.wait(PATIENCE), 1 / 0))
    work.put(lambda: done.append(3))
    assert not work.failed
    release.set()
    with pytest.raises(ZeroDivisionError):
        work.wait()
    assert done == [1] and not work.failed
    work.put(lambda: done.append(4))
    work.wait()
    assert done == [1, 4]
