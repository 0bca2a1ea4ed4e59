"""Two processes are one command: one report of both, and one reason if it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Ended, launch

from mfuser import Registry, build_model, load_registry
from mfuser.data.images import UnreadableImage
from mfuser.engine import checkpoints, processes
from mfuser.engine import train as training
from mfuser.engine.run import evaluate, resolve, train
from mfuser.engine.wrapping import without_gradient
from mfuser.errors import MFuserError

SINGLE = '[dataset.single]\nextends = "toy"\ncount = 1\nseed = 3\n'
COUNTING = """
[pairing.counting]
extends  = "tiny"
losses   = ["ohem", "class_balanced"]
fusion   = { name = "convolution", dropout = 0.0 }
enhancer = { name = "cross_attention", width = 32, dropout = 0.0 }
"""
"""Every loss that counts, and no random numbers but the points that masks are compared at."""
TINY = ("--recipe", "tiny", "--device", "cpu")


@pytest.fixture
def two(write_registry: Any, tmp_path: Path) -> Callable[..., list[Ended]]:
    """A command line in two processes, on the tiny registry."""

    def run(*arguments: object, **more: Any) -> list[Ended]:
        return launch([*arguments, "--registry", write_registry()], tmp_path, **more)

    return run


def spoil(change: Callable[[int, int], None]) -> Callable[[int], None]:
    """In each process: `change(rank, index)` before the rendered source gives an image."""

    def prepare(rank: int) -> None:
        from mfuser_plugins.datasets.streets import Streets

        original = Streets.__getitem__

        def item(self: Streets, index: int) -> Any:
            change(rank, index)
            return original(self, index)

        Streets.__getitem__ = item  # type: ignore[method-assign]

    return prepare


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_with_two_is_one_run(tiny: Registry, two: Any, tmp_path: Path) -> None:
    """Each takes a crop of the step, as one process that takes both: the same losses."""
    settings = ["batch_size=2", "augmentation.photometric=false", "seed=3"]
    run = resolve(tiny, "plain", "tiny", recipe_settings=settings)
    train(run, tmp_path / "one", registry=tiny, evaluate=False, quiet=True)
    plain = ("--set-recipe", "augmentation.photometric=false", "--seed", 3)
    ended = two("train", "plain", *TINY, *plain, "--out", tmp_path / "two", "--json")
    assert [e.code for e in ended] == [0, 0], ended
    report = json.loads(ended[0].out)
    assert ended[1].out == "" and "training" not in ended[1].err
    folder = tmp_path / "two"
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["protocol"]["batch"] == 2
    assert {d["images"] for d in report["domains"].values()} == {2}
    assert {p.name for p in (folder / "pictures").iterdir()} == {
        "overview.png",
        "toy.png",
        "toy-night.png",
    }
    for mine, theirs in zip(log(folder), log(tmp_path / "one"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["loss_align"] == pytest.approx(theirs["loss_align"], rel=1e-3)
    # What was evaluated is what was saved, in both: not the second one's running statistics.
    again = evaluate(folder, registry=tiny, device="cpu", out=tmp_path / "again", quiet=True)
    for name, domain in again.report.domains.items():
        assert domain.miou == pytest.approx(report["domains"][name]["miou"], abs=1e-6)


def test_two_end_in_the_weights_of_one_with_the_whole_batch(
    write_registry: Any, mfuser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loss that divides by a count divides by that of both, whose crops show unequally much.

    In float64, since rounding in float32 decides here and there where a query attends. The points
    that masks are compared at come from each process's own generator: here they are pinned.
    """

    def pin(rank: int) -> None:
        from mfuser_plugins.datasets.streets import Streets
        from mfuser_plugins.decoders._mask_losses import MaskLosses

        def points(self: MaskLosses, masks: torch.Tensor, *drawn: object) -> torch.Tensor:
            generator = torch.Generator().manual_seed(1)
            same = torch.rand(self.num_points, 2, dtype=masks.dtype, generator=generator)
            return same.expand(len(masks), -1, -1)

        item = Streets.__getitem__

        def unequal(self: Streets, index: int) -> Any:
            sample = item(self, index)
            label = sample.label.copy()
            label[:, : 30 * (index % 3)] = 255
            return replace(sample, label=label)

        monkeypatch.setattr(MaskLosses, "draw", points)
        monkeypatch.setattr(Streets, "__getitem__", unequal)
        monkeypatch.setattr(training, "build_model", lambda *a, **k: build_model(*a, **k).double())

    file = write_registry(COUNTING)
    command = ("train", "counting", *TINY, "--no-evaluate", "--seed", 3, "--registry", file)
    ended = launch([*command, "--out", tmp_path / "two"], tmp_path, prepare=pin)
    assert [e.code for e in ended] == [0, 0], ended
    assert "arning" not in ended[0].err + ended[1].err  # of torch, on gradients and their buckets
    pin(0)
    whole = (*command, "--set-recipe", "batch_size=2")
    assert mfuser(*whole, "--out", tmp_path / "one").code == 0
    one = checkpoints.read(tmp_path / "one" / checkpoints.FINAL).model

    def differs(folder: str) -> float:
        other = checkpoints.read(tmp_path / folder / checkpoints.FINAL).model
        return max(float((other[name] - tensor).abs().max()) for name, tensor in one.items())

    assert differs("two") < 1e-6
    for mine, theirs in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        del mine["seconds"], theirs["seconds"]
        assert mine == pytest.approx(theirs, rel=1e-5)

    # From the middle on in shards, and from the middle of that with one process: the crops of a
    # step are the same, and checkpoints are whole.
    shutil.copytree(tmp_path / "two", tmp_path / "shards")
    back(tmp_path / "shards", 2)
    sharded = ("--set-recipe", "shard=true", "--set-recipe", "save_every=1")
    more = (*sharded, "--resume", "--out", tmp_path / "shards")
    ended = launch([*command, *more], tmp_path, prepare=pin)
    assert [e.code for e in ended] == [0, 0], ended
    assert differs("shards") < 1e-6
    back(tmp_path / "shards", 3)
    refused = mfuser(*command, "--out", tmp_path / "shards", "--resume")
    assert refused.code == 2 and refused.err.strip().endswith(
        "shards was begun with 2 crops a step (batch_size 1 x 2 processes x accumulate 1), and "
        "this run has 1 crops a step (batch_size 1 x 1 process x accumulate 1): resume with "
        "--set-recipe batch_size=2"
    )
    assert mfuser(*whole, "--out", tmp_path / "shards", "--resume").code == 0
    assert differs("shards") < 1e-6


def back(folder: Path, step: int) -> None:
    """A finished run as it was after an earlier step, with the checkpoint before the last."""
    (folder / checkpoints.FINAL).unlink()
    assert checkpoints.read(folder / checkpoints.PREVIOUS).step == step
    (folder / checkpoints.PREVIOUS).rename(folder / checkpoints.LAST)


def test_parameters_that_a_step_may_leave_out(tiny: Registry) -> None:
    """Found before the first step, and the model stays as it was."""
    model = build_model(tiny.pairing("plain"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with processes.processes(device="cpu") as group:
        assert without_gradient(model, group.accelerator) == []
        model.decoder.register_parameter("idle", torch.nn.Parameter(torch.zeros(1)))
        assert without_gradient(model, group.accelerator) == ["decoder.idle"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_evaluating_with_two_is_one_report(
    trained: Path, write_registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of both, pictures of both, and what was skipped by either: the same to the last digit.
    Of a domain with a single image, one process has nothing to do."""

    def bad(rank: int, index: int) -> None:
        if index in (1, 4):
            raise UnreadableImage("x")

    file = write_registry(SINGLE)
    targets = ["toy", "single"]
    options = ("--targets", ",".join(targets), "--limit", 6, "--device", "cpu", "--json")
    prepare = spoil(bad)
    original = checkpoints.load_model

    def skipping(*arguments: Any) -> Any:
        model, checkpoint = original(*arguments)
        checkpoint.meta["run"]["recipe"]["on_bad_image"] = "skip"
        return model, checkpoint

    from mfuser.engine import evaluate as module

    monkeypatch.setattr(module, "load_model", skipping)
    command = ("evaluate", trained, *options, "--registry", file, "--out", tmp_path / "two")
    ended = launch(command, tmp_path, prepare=prepare)
    assert [e.code for e in ended] == [0, 0], ended
    report = json.loads(ended[0].out)
    assert ended[1].out == ""
    from mfuser_plugins.datasets.streets import Streets

    monkeypatch.setattr(Streets, "__getitem__", Streets.__getitem__)  # put back afterwards
    prepare(0)
    one = evaluate(
        trained,
        registry=load_registry(file),
        targets=targets,
        limit=6,
        device="cpu",
        out=tmp_path / "one",
    ).report.as_json()
    assert len(one["domains"]["toy"]["skipped"]) == 2 and one["domains"]["single"]["images"] == 1
    assert report == one
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two")]
    assert reports[0] == reports[1] == report
    sheets = [(tmp_path / name / "pictures" / "toy.png").stat().st_size for name in ("one", "two")]
    assert sheets[0] == pytest.approx(sheets[1], rel=0.02)  # the same rows


def test_a_bad_image_of_one_ends_both_with_one_sentence(
    tiny: Registry, two: Any, tmp_path: Path
) -> None:
    seen: list[int] = []

    def bad(rank: int, index: int) -> None:
        seen.append(index)
        if rank == 1 and len(seen) > 3:  # the first image is looked at before the first step
            raise UnreadableImage("street.png cannot be read")

    ended = two("train", "plain", *TINY, "--out", tmp_path / "r", prepare=spoil(bad))
    assert [e.code for e in ended] == [2, 2], ended
    assert "mfuser:" not in ended[0].err
    said = [line for line in ended[1].err.splitlines() if line.startswith("mfuser:")]
    assert len(said) == 1
    assert said[0] == "mfuser: street.png cannot be read (2 steps are saved; fix it and --resume)"
    assert checkpoints.read(tmp_path / "r" / checkpoints.LAST).step == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_the_other(two: Any, tmp_path: Path, rank: int) -> None:
    def kill(mine: int) -> None:
        original = processes.Processes.mean
        calls: list[int] = []

        def mean(self: processes.Processes, values: dict[str, float]) -> dict[str, float]:
            calls.append(1)
            if mine == rank and len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, values)

        processes.Processes.mean = mean  # type: ignore[method-assign]
        processes.PATIENCE = 0.5

    begun = time.monotonic()
    ended = two("train", "plain", *TINY, "--out", tmp_path / "r", prepare=kill)
    assert time.monotonic() - begun < 45
    assert ended[rank].code == -signal.SIGKILL
    other = ended[1 - rank]
    assert other.code == 2, other
    last = other.err.strip().splitlines()[-1]
    who = (
        r"process 0 at 127\.0\.0\.1 \(or its machine\)" if rank == 0 else r"process 1 \(\S+, \d+\)"
    )
    assert re.match(rf"mfuser: {who} of the 2 processes ended without saying why", last), other.err
    assert last.endswith("go on with --resume")


def test_an_error_in_the_middle_of_a_step_tells_the_other(two: Any, tmp_path: Path) -> None:
    def fail(rank: int) -> None:
        from mfuser.model.dgss import DGSSModel

        original = DGSSModel.losses
        calls: list[int] = []

        def losses(self: DGSSModel, *arguments: Any) -> Any:
            calls.append(1)
            if rank == 1 and len(calls) == 3:
                raise MFuserError("the loss has no idea")
            return original(self, *arguments)

        DGSSModel.losses = losses  # type: ignore[method-assign]

    ended = two("train", "plain", *TINY, "--out", tmp_path / "r", prepare=fail)
    assert [e.code for e in ended] == [2, 2], ended
    assert "mfuser: the loss has no idea" in ended[1].err
    assert "process 1 of 2 ended: the loss has no idea; go on with --resume" in ended[0].err


def test_a_folder_that_is_taken_is_refused_once(trained: Path, two: Any) -> None:
    ended = two("train", "plain", *TINY, "--out", trained)
    assert [e.code for e in ended] == [2, 2]
    assert ended[0].err.count("already holds a run") == 1 and "mfuser" not in ended[1].err


@pytest.mark.parametrize("command", [("predict", "run", "image.png"), ("ablate", "mini_fusion")])
def test_commands_of_one_process_say_so(
    mfuser: Any, monkeypatch: pytest.MonkeyPatch, inside: Path, command: tuple[str, ...]
) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    (inside / "image.png").touch()
    outcome = mfuser(*command)
    assert outcome.code == 2
    assert f"'mfuser {command[0]}' is one process, the launcher started 2" in outcome.err


# ---- launchers


def test_launchers_that_would_train_side_by_side(
    mfuser: Any, monkeypatch: pytest.MonkeyPatch, write_registry: Any, inside: Path
) -> None:
    command = ("train", "plain", *TINY, "--registry", write_registry(), "--out", "r")
    for variables, message in (
        # accelerate launch with an FSDP file
        (
            {"ACCELERATE_USE_FSDP": "true", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
            "accelerate's configuration asks for the first version of FSDP",
        ),
        # accelerate launch --cpu --num_processes 2
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "accelerate launch was asked for several processes and started one",
        ),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            outcome = mfuser(*command)
        assert outcome.code == 2 and message in outcome.err
        assert "torchrun --nproc_per_node N -m mfuser" in outcome.err
        assert not (inside / "r").exists()


def test_a_launcher_does_not_scale_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with processes.processes(device="cpu") as group:
        assert group.accelerator.gradient_accumulation_steps == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["torch.distributed.run"], id="torchrun"),
        pytest.param(
            ["accelerate.commands.launch", "--config_file", "examples/launch/sharded.yaml"],
            id="accelerate",
            marks=pytest.mark.long,
        ),
    ],
)
def test_launchers(launcher: list[str], write_registry: Any, root: Path, tmp_path: Path) -> None:
    """The documented commands, without --device: processes on CPUs are connected too, and more of
    them than there are images."""
    count = "--num_processes" if "accelerate" in launcher[0] else "--nproc_per_node"
    command = [sys.executable, "-m", *launcher, count, "2"]
    command += ["-m", "mfuser", "train", "lone", "--recipe", "tiny", "--json", "--out"]
    command += [str(tmp_path / "run"), "--registry", str(write_registry(SINGLE)), "--steps", "2"]
    command += ["--source", "single"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "--targets", "toy"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["protocol"]["batch"] == 2
