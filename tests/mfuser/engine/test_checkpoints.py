"""Checkpoints: round trips, whole files or none, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mfuser import DGSSModel, MFuserError, Registry, build_model
from mfuser.engine import checkpoints, saving
from mfuser.engine.checkpoints import Checkpoint, load_model
from mfuser.errors import CheckpointError


@pytest.fixture
def model(tiny: Registry) -> DGSSModel:
    return build_model("tiny", tiny)


def meta(model: DGSSModel, step: int = 3) -> dict[str, object]:
    return {
        "pairing": model.spec.model_dump(mode="json"),
        "run": {"seed": 0, "plugins": []},
        "step": step,
        "frozen": checkpoints.frozen_fingerprint(model),
    }


def save(model: DGSSModel, path: Path, **changes: object) -> Path:
    state = checkpoints.trained_state(model)
    checkpoints.write(path, Checkpoint(state, {}, meta(model) | changes))
    return path


def shaken(model: DGSSModel) -> DGSSModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.5)
    return model


def test_a_model_comes_back_from_its_file_alone(model: DGSSModel, tmp_path: Path) -> None:
    shaken(model)
    path = save(model, tmp_path / "model.safetensors")
    again, checkpoint = load_model(path)
    assert checkpoint.step == 3 and again.spec == model.spec and not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    image = torch.rand(1, 3, 64, 96)
    assert torch.equal(model.segment(image), again.segment(image))
    assert load_model(tmp_path)[1].step == 3  # the folder, too


def test_only_what_trains_is_inside(tiny: Registry, model: DGSSModel, tmp_path: Path) -> None:
    path = save(model, tmp_path / "c.safetensors")
    with safe_open(path, "pt") as file:
        names = [n.removeprefix("model.") for n in file.keys()]  # noqa: SIM118
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained <= set(names)
    assert not [n for n in names if n.startswith(("encoder.vfm", "encoder.vlm"))]
    plain = build_model("plain", tiny, vfm={"freeze": False})
    state = checkpoints.trained_state(plain)
    assert [n for n in state if n.startswith("encoder.vfm.")]
    assert not [n for n in state if n.startswith("encoder.vlm.")]
    assert {"decoder.norm.running_mean", "decoder.norm.running_var"} <= set(state)


def test_tied_and_sliced_tensors_are_written_whole(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "b": whole, "c": whole[1], "d": whole.t()}
    path = tmp_path / "c.safetensors"
    checkpoints.write(path, Checkpoint(state, {}, {"pairing": {}, "run": {}, "step": 0}))
    read = checkpoints.read(path).model
    assert all(torch.equal(read[k], state[k]) for k in state)


def test_a_crash_while_writing_leaves_the_old_file_whole(
    model: DGSSModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(model, tmp_path / "last.safetensors")
    before = path.read_bytes()
    shaken(model)

    def die(*_: object) -> None:
        raise KeyboardInterrupt  # nothing of ours catches it, as nothing catches SIGKILL

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.os, step, die)
            with pytest.raises(KeyboardInterrupt):
                save(model, path)
        assert path.read_bytes() == before
        assert checkpoints.read(path).step == 3
    save(model, path, step=4)
    assert checkpoints.read(path).step == 4


def test_killed_between_the_two_names_of_a_file(model: DGSSModel, tmp_path: Path) -> None:
    """Renaming one name of a file to its other one removes neither; emptied by the next save, what
    was left would take the previous checkpoint, and a resumed optimizer's memory, with it."""
    last, previous = tmp_path / checkpoints.LAST, tmp_path / checkpoints.PREVIOUS
    state = checkpoints.trained_state(model)
    checkpoints.write_last(tmp_path, Checkpoint(state, {}, meta(model) | {"step": 1}))
    os.link(last, previous)
    for step in (2, 3):
        checkpoints.write_last(tmp_path, Checkpoint(state, {}, meta(model) | {"step": step}))
        assert {p.name for p in tmp_path.iterdir()} == {last.name, previous.name}
        assert (checkpoints.read(previous).step, checkpoints.read(last).step) == (step - 1, step)


def test_a_full_disk_leaves_the_old_file_and_no_other(
    model: DGSSModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(model, tmp_path / "last.safetensors")
    before = path.read_bytes()

    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written.*No space left"):
        save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.safetensors"]


def test_what_a_killed_process_left_goes_with_the_next_checkpoint(
    model: DGSSModel, tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    gone, path = process.pid, tmp_path / "last.safetensors"
    leftover = tmp_path / f".last.safetensors.{gone}.tmp"
    folder = tmp_path / f".last.safetensors.0{gone}.tmp"
    folder.mkdir()
    kept = [
        tmp_path / f".last.safetensors.{os.getppid()}.tmp",  # it may be writing
        tmp_path / f".last.safetensors.{10**30}.tmp",
        tmp_path / f".model.safetensors.{gone}.tmp",  # of another file
        tmp_path / f"last.safetensors.{gone}.tmp",
        tmp_path / f".lastXsafetensors.{gone}.tmp",
        tmp_path / f".last.safetensors.{gone}.tmp.bak",
        tmp_path / ".last.safetensors.x.tmp",
        folder / leftover.name,
    ]
    for file in [leftover, *kept]:
        file.write_bytes(b"half")
    save(model, path)
    assert checkpoints.read(path).step == 3
    assert not leftover.exists() and all(file.exists() for file in kept)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_file_cut_off_is_refused(model: DGSSModel, tmp_path: Path, share: float) -> None:
    path = save(model, tmp_path / "model.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is not a whole safetensors file"
    ):
        load_model(path)


def test_files_of_others_are_refused(model: DGSSModel, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="holds tensors but is not a checkpoint of this proj"):
        load_model(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"there is no run folder or checkpoint .*none"):
        load_model(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="holds no run: neither model.safetensors nor last"):
        load_model(empty)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    for write in (
        lambda p: p.write_bytes(pickle.dumps(Payload())),
        lambda p: torch.save({"model": Payload()}, p),
    ):
        path = tmp_path / "model.safetensors"
        write(path)
        with pytest.raises(CheckpointError):
            load_model(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "many"},
        {"step": None},
        {"pairing": 3},
        {"pairing": []},
        {"run": "x"},
    ],
)
def test_damaged_metadata(model: DGSSModel, tmp_path: Path, damage: dict[str, object]) -> None:
    path = save(model, tmp_path / "model.safetensors", **damage)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its metadata is damaged"):
        load_model(path)


def test_metadata_that_is_no_json(model: DGSSModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"model.x": torch.zeros(1)}, path, {"format": checkpoints.FORMAT, "step": "{"})
    with pytest.raises(CheckpointError, match="its metadata is damaged"):
        load_model(path)


def test_a_pairing_that_no_longer_holds_is_named(model: DGSSModel, tmp_path: Path) -> None:
    pairing = json.loads(json.dumps(model.spec.model_dump(mode="json")))
    pairing["fusion"]["name"] = "swapped"
    path = save(model, tmp_path / "c.safetensors", pairing=pairing, run={"plugins": ["swap.py"]})
    with pytest.raises(CheckpointError, match=r"c\.safetensors.*'swapped'.*--plugin swap\.py"):
        load_model(path)


def test_another_pairing_does_not_take_it(tiny: Registry, model: DGSSModel, tmp_path: Path) -> None:
    path = save(model, tmp_path / "c.safetensors")
    checkpoint = checkpoints.read(path)
    other = build_model("plain", tiny)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"c\.safetensors does not fit this pairing: .*more\)"
    ):
        checkpoints.restore(other, checkpoint, path)
    wide = build_model("tiny", tiny, pyramid={"width": 48})
    with pytest.raises(CheckpointError, match=r"is \(32.*the model has \(48"):
        checkpoints.restore(wide, checkpoint, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_other_frozen_weights_are_told_apart(
    tiny: Registry, model: DGSSModel, tmp_path: Path
) -> None:
    path = save(model, tmp_path / "c.safetensors")
    with torch.no_grad():
        parameters = dict(model.encoder.vfm.named_parameters())  # type: ignore[union-attr]
        parameters["model.blocks.1.mlp.fc1.weight"].mul_(1.001)
    with pytest.raises(CheckpointError, match=r"frozen weights of its vfm are not.*vfm\.weights="):
        checkpoints.restore(model, checkpoints.read(path), path)


def test_frozen_weights_may_differ_by_rounding(
    tiny: Registry, model: DGSSModel, tmp_path: Path
) -> None:
    """Positions resampled on another machine differ in their last bits."""
    path = save(model, tmp_path / "c.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.requires_grad else 1 + 1e-6)
    moved = {n: p.clone() for n, p in model.named_parameters()}
    checkpoint = checkpoints.read(path)
    checkpoints.restore(model, checkpoint, path)
    for name, parameter in model.named_parameters():
        kept = checkpoint.model[name] if parameter.requires_grad else moved[name]
        assert torch.equal(parameter, kept), name


def test_settings_find_weights_that_moved(model: DGSSModel, tmp_path: Path) -> None:
    path = save(model, tmp_path / "c.safetensors")
    with pytest.raises(MFuserError, match="moved.pth"):
        load_model(path, settings=["vfm.weights=moved.pth"])
    assert load_model(path, settings=["vfm.weights=random"])[1].step == 3


def test_the_optimizer_comes_back(tmp_path: Path) -> None:
    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()

    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    one = torch.optim.AdamW(first.parameters(), lr=0.1)
    inputs = torch.randn(4, 5, 3)
    for x in inputs[:3]:
        step(first, one, x)
    names = {p: n for n, p in first.named_parameters()}
    saved = saving.to_optimizer_state(one, names)
    assert sorted({k.split(".")[0] for k in saved}) == ["exp_avg", "exp_avg_sq", "step"]

    second.load_state_dict(first.state_dict())
    two = torch.optim.AdamW(second.parameters(), lr=0.1)
    theirs = {p: n for n, p in second.named_parameters()}
    saving.from_optimizer_state(two, theirs, {k: v.clone() for k, v in saved.items()})
    step(first, one, inputs[3])
    step(second, two, inputs[3])
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    with pytest.raises(CheckpointError, match="knows a tensor weights that the model lacks"):
        saving.from_optimizer_state(two, theirs, {"exp_avg.weights": torch.zeros(1)})


def test_complete_file_of_a_model_that_computes_with_its_parameters(
    tiny: Registry, tmp_path: Path
) -> None:
    """Swin v2's constructor cannot run with parameters on the meta device."""
    options = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    swin = {
        "name": "timm",
        "model": "swinv2_tiny_window8_256",
        "weights": "random",
        "options": options,
    }
    spec = tiny.pairing("tiny", {"vfm": swin})
    model = build_model(spec)
    path = tmp_path / "whole.safetensors"
    whole = checkpoints.Checkpoint(dict(model.state_dict()), {}, meta(model) | {"complete": True})
    checkpoints.write(path, whole)
    again, _ = load_model(path)
    image = torch.rand(1, 3, 64, 96)
    assert torch.equal(model.segment(image), again.segment(image))


@pytest.mark.parametrize(("write", "message"), [
    (lambda p: torch.save({"state_dict": {"backbone.blocks.0.norm.weight": torch.ones(2)}}, p),
     "written by torch.save .* holds .*backbone.*mfuser convert"),
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "pointer of Git LFS"),
    (lambda p: p.write_text("<html>"), "is not a checkpoint of this project.*web page"),
    (lambda p: save_file({"patch_embed.proj.weight": torch.ones(8, 3, 4, 4)}, p),
     "not a checkpoint of this project .*transformer of width 8"),
])  # fmt: skip
def test_files_of_others_are_named_for_what_they_are(
    write: Any, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(tmp_path / "best.pth")
