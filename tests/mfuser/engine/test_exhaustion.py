"""Memory that runs out: one sentence on what to lower first, and no step is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mfuser import Registry
from mfuser.engine import checkpoints, exhaustion
from mfuser.engine.train import train
from mfuser.errors import ElsewhereError, OutOfMemoryError, out_of_memory
from mfuser.model.dgss import DGSSModel

IMPOSSIBLE = 2**58


def exhausted(*_: object, **__: object) -> None:
    torch.empty(IMPOSSIBLE)  # the allocator's own error


def test_in_a_step(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ("steps=3", "save_every=100", "batch_size=2")
    run = begin("plain", *recipe)
    train(tiny, run, tmp_path / "whole")
    losses, calls = DGSSModel.losses, []

    def full(self: DGSSModel, *arguments: Any) -> Any:
        calls.append(1)
        found = losses(self, *arguments)  # running statistics are other ones now
        return exhausted() if len(calls) == 3 else found

    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError) as caught:
        patch.setattr(DGSSModel, "losses", full)
        train(tiny, run, tmp_path / "r")
    said = str(caught.value)
    assert said.startswith("out of memory in step 3 on the CPU, 2 crops of 96x64 at a time: at the")
    order = [
        "checkpointing=true",
        "batch_size=1 --set-recipe accumulate=2",
        "precision=bf16",
        "--set image_size=",
        "(2 steps are saved; --resume goes on)",
    ]
    places = [said.index(words) for words in order]
    assert places == sorted(places) and caught.value.exit_code == 2
    assert checkpoints.read(tmp_path / "r" / checkpoints.LAST).step == 2
    again = begin("plain", *recipe, "checkpointing=true")
    train(tiny, again, tmp_path / "r", resume=True)
    one, other = (checkpoints.read(tmp_path / n / checkpoints.FINAL).model for n in ("whole", "r"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_while_the_weights_change(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are neither the old nor the new ones, so they are not saved."""
    step, calls = torch.optim.AdamW.step, []

    def half(self: torch.optim.AdamW, *_: Any) -> None:
        calls.append(1)
        exhausted() if len(calls) == 3 else step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(OutOfMemoryError, match="(?!.*are saved)"):
        train(tiny, begin("plain", "save_every=1"), tmp_path / "r")
    assert checkpoints.read(tmp_path / "r" / checkpoints.LAST).step == 2


def test_in_a_prediction(
    mfuser: Any,
    trained: Path,
    write_registry: Any,
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_registry()
    for name in ("a", "b"):
        Image.new("RGB", (96, 64)).save(f"{name}.png")
    segment, calls = DGSSModel.segment_by, []

    def full(self: DGSSModel, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return exhausted() if len(calls) == 1 else segment(self, *arguments, **options)

    monkeypatch.setattr(DGSSModel, "segment_by", full)
    command = ["predict", trained, "a.png", "b.png", "--set", "inference.window_batch=4"]
    done = mfuser(*command, "--skip-bad")
    said = " ".join(done.err.split())
    assert done.code == 0 and "skipped: a.png: out of memory: an image of 96x64" in said
    assert said.index("inference.window_batch=1 (now 4)") < said.index("--scale 0.5")
    calls.clear()
    done = mfuser(*command, "--out", "other")
    assert done.code == 2 and "mfuser: a.png: out of memory" in done.err
    calls.clear()
    done = mfuser("evaluate", trained, "--limit", 1, "--targets", "toy", "--out", "e")
    assert done.code == 2 and "out of memory: an image of 96x64" in done.err


def test_the_unit_of_a_macs_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustion.sys, "platform", "darwin")
    on_a_mac = exhaustion.peak(torch.device("cpu"))  # counts in bytes there
    monkeypatch.undo()
    assert exhaustion.peak(torch.device("cpu")) >= 1000 * on_a_mac > 0
    assert exhaustion.where(torch.device("mps")) == "mps"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("shapes do not fit"), False),
        (ElsewhereError("process 1 of 2: out of memory in step 3"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
