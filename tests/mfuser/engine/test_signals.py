"""Signals of schedulers before a time limit: the run is saved, and an exit code requeues it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import training
from stopping import stop_after

from mfuser.engine import checkpoints, signals
from mfuser.engine.signals import REQUEUE, Ended, ending, interruptible

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


def send(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def scontrol(inside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM that writes down what it is asked for, after a signal that arrives once more."""
    program = inside / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nkill -USR1 $PPID\necho "$@" >> {inside}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return inside / "asked"


def test_the_same_command_begins_goes_on_and_ends(
    mfuser: Any,
    write_registry: Any,
    inside: Path,
    scontrol: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["train", "plain", "--recipe", "tiny", "--registry", write_registry(), "--device",
               "cpu", "--no-evaluate", "--set-recipe", "save_every=100"]  # fmt: skip
    assert mfuser(*command, "--out", "whole").code == 0
    command += ["--out", "run", "--resume", "auto", "--requeue"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2, send(signal.SIGUSR1))
        ended = mfuser(*command)
    assert ended.code == REQUEUE == 75, ended.err
    said = " ".join(ended.err.split())
    assert "interrupted by SIGUSR1 after step 2; all is saved in run" in said
    assert "job 4711 is back in the queue" in said
    assert scontrol.read_text() == "requeue 4711\n"
    assert mfuser(*command).code == 0
    one, other = (checkpoints.read(Path(n) / checkpoints.FINAL).model for n in ("whole", "run"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_resume_and_what_follows_it(mfuser: Any, write_registry: Any, inside: Path) -> None:
    registry = write_registry()
    tail = ["--recipe", "tiny", "--registry", registry, "--no-evaluate", "--out", "run"]
    fresh = mfuser("train", "--resume", "plain", *tail)  # not a value of --resume
    assert fresh.code == 2 and "run holds no run to resume" in fresh.err
    wrong = mfuser("train", "plain", "--resume=always", *tail)
    assert wrong.code == 2 and "'always' is not one of 'yes', 'auto'" in wrong.err


def test_in_the_evaluation_there_is_nothing_to_save(
    mfuser: Any, write_registry: Any, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mfuser.engine.evaluate.assess", lambda *_, **__: send(signal.SIGUSR1)())
    before = [signal.getsignal(n) for n in signals.SIGNALS]
    command = ("train", "plain", "--recipe", "tiny", "--registry", write_registry())
    ended = mfuser(*command, "--requeue")
    assert ended.code == REQUEUE
    assert scontrol.read_text() == "requeue 4711\n"
    assert ended.err.strip().splitlines()[-1] == (
        "mfuser: ended by SIGUSR1; start it again to go on"
    )
    assert [signal.getsignal(n) for n in signals.SIGNALS] == before


def test_no_slurm_to_requeue_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "this is not a SLURM job" in signals.requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("PATH", "")
    assert signals.requeue().startswith("--requeue: job 12_3 could not be requeued: ")


def test_signals_twice_late_and_of_others() -> None:
    with pytest.raises(Ended) as late, ending(), interruptible() as asked:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)  # the scheduler's, a launcher's, and Ctrl-C once
        assert asked() and asked.number == signal.SIGTERM
    assert late.value.number == signal.SIGTERM  # nobody had stopped for it
    with pytest.raises(KeyboardInterrupt), interruptible():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        with ending(), interruptible() as asked:
            os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2] and not asked()


@pytest.mark.slow
def test_a_scheduler_reaches_every_process(write_registry: Any, tmp_path: Path) -> None:
    """Loader workers too, and twice, as where a launcher passes on what all got."""
    process = training(write_registry(), tmp_path, steps=100_000)
    os.killpg(process.pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == REQUEUE, err
    assert "Traceback" not in err and "interrupted by SIGTERM after step" in err
    assert checkpoints.read(tmp_path / "run" / checkpoints.LAST).step > 0
