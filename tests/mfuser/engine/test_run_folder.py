"""Run folders after kills, flipped bits and full disks: nothing twice, nothing lost unsaid."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mfuser import Registry
from mfuser.config.run import RunSpec
from mfuser.engine import checkpoints
from mfuser.engine.checkpoints import FINAL, LAST, PREVIOUS
from mfuser.engine.folder import LOG, PAGE, RUN
from mfuser.engine.log import Log
from mfuser.engine.train import Diverged, train
from mfuser.errors import CheckpointError, DataError
from mfuser.interfaces import IGNORE

RECIPE = ("steps=7", "save_every=2")


def kill(tiny: Registry, run: RunSpec, folder: Path) -> Path:
    """A run of seven steps with a checkpoint every two, killed after step 5 was logged."""
    original = Log.write

    def write(self: Log, step: int, values: dict[str, float]) -> None:
        original(self, step, values)
        if step == 5:
            raise KeyboardInterrupt  # nothing of ours catches it, as nothing catches SIGKILL

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mfuser.engine.train.EVERY", 1)
        patch.setattr(Log, "write", write)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, run, folder)
    return folder


@pytest.fixture(scope="module")
def killed_once(tiny: Registry, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, Path]:
    recipe = tiny.recipe("tiny", RECIPE)
    run = RunSpec.of(tiny, "plain", "tiny", pairing=tiny.pairing("plain"), recipe=recipe)
    return run, kill(tiny, run, tmp_path_factory.mktemp("killed") / "run")


@pytest.fixture
def killed(killed_once: tuple[RunSpec, Path], tmp_path: Path, every_step: None) -> Path:
    """A copy of such a run's folder, to go on in."""
    return Path(shutil.copytree(killed_once[1], tmp_path / "killed"))


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfuser.engine.train.EVERY", 1)


@pytest.fixture(scope="module")
def whole(
    tiny: Registry, killed_once: tuple[RunSpec, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the same run, which nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mfuser.engine.train.EVERY", 1)
        train(tiny, killed_once[0], folder)
    return folder


def steps(folder: Path) -> list[int]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def same(one: Path, other: Path) -> bool:
    a, b = (checkpoints.read(f / FINAL).model for f in (one, other))
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 0x40
    path.write_bytes(bytes(content))


# ---- the log


def test_the_log_is_cut_back_to_the_checkpoint(
    tiny: Registry, begin: Any, killed: Path, whole: Path
) -> None:
    folder = killed
    assert steps(folder) == [1, 2, 3, 4, 5] and checkpoints.read(folder / LAST).step == 4
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 6, "loss": 4.0')  # half a line, as a kill may leave it
    train(tiny, begin("plain", *RECIPE), folder, resume=True)
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7]
    losses = [
        [json.loads(line)["loss"] for line in (f / "log.jsonl").read_text().splitlines()]
        for f in (folder, whole)
    ]
    assert losses[0] == losses[1]


def test_tensorboard_is_cut_back_too(
    tiny: Registry, begin: Any, tmp_path: Path, every_step: None
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = begin("plain", *RECIPE, "tracker=tensorboard")
    folder = kill(tiny, run, tmp_path / "r")
    train(tiny, run, folder, resume=True)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7]


# ---- the checkpoints


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.5, 0.9, 1.0])
def test_a_flipped_bit_is_found_anywhere(
    tiny: Registry, begin: Any, trained: Path, tmp_path: Path, share: float
) -> None:
    path = tmp_path / FINAL
    path.write_bytes((trained / FINAL).read_bytes())
    flip(path, share)
    with pytest.raises(CheckpointError, match="is damaged: its content|is not a whole safetensors"):
        checkpoints.read(path)


def test_numbers_of_the_checksum(tmp_path: Path) -> None:
    """Every type has one, and names, shapes and metadata count as well as values."""
    one = {
        "a": torch.ones(2, 3),
        "b": torch.ones((), dtype=torch.bfloat16),
        "c": torch.tensor([True, False]),
        "d": torch.zeros(0, 4),
        "e": torch.arange(4),
    }
    digest = checkpoints._checksum(one, {"step": "3"})
    assert digest == checkpoints._checksum(dict(reversed(one.items())), {"step": "3"})
    others: list[tuple[dict[str, torch.Tensor], dict[str, str]]] = [
        (one | {"a": torch.ones(3, 2)}, {"step": "3"}),
        (one | {"a": torch.ones(2, 3).double()}, {"step": "3"}),
        (one | {"f": one["e"]}, {"step": "3"}),
        (one, {"step": "4"}),
    ]
    assert len({digest, *(checkpoints._checksum(*other) for other in others)}) == 5


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tiny: Registry,
    begin: Any,
    killed: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    folder = killed
    last = folder / LAST
    assert checkpoints.read(folder / PREVIOUS).step == 2
    content = last.read_bytes()
    if damage == "bit":
        flip(last, 0.7)
    elif damage == "gone":
        last.unlink()
    else:
        last.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    capsys.readouterr()
    train(tiny, begin("plain", *RECIPE), folder, resume=True)
    said = capsys.readouterr().err
    assert f"resuming {folder} at step 2" in said
    assert ("kept as damaged-last.safetensors" in said) == (damage != "gone")
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7]
    assert same(folder, whole)
    assert checkpoints.read(folder / LAST).step == 7
    assert checkpoints.read(folder / PREVIOUS).step == 6


def test_without_any_whole_checkpoint_a_run_begins_again(
    tiny: Registry, begin: Any, killed: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = killed
    for name in (LAST, PREVIOUS):
        flip(folder / name, 0.6)
    train(tiny, begin("plain", *RECIPE), folder, resume=True)
    said = capsys.readouterr().err
    assert said.count("is damaged") == 2 and f"resuming {folder} at step 0" in said
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7]
    assert same(folder, whole)


def test_a_damaged_finished_model_is_written_again(
    tiny: Registry, begin: Any, tmp_path: Path, whole: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "r"))
    # Copies: what is read is mapped from the file.
    before = {k: t.clone() for k, t in checkpoints.read(folder / FINAL).model.items()}
    flip(folder / FINAL, 0.7)
    train(tiny, begin("plain", *RECIPE), folder, resume=True)
    after = checkpoints.read(folder / FINAL).model
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_files_from_before_the_checksum_are_read(tiny: Registry, trained: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    content = (trained / FINAL).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    del header["__metadata__"]["checksum"]
    text = json.dumps(header).encode()
    path = tmp_path / FINAL
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    assert checkpoints.read(path).step == 4


def test_one_umask_for_all(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(tiny, begin("plain", *RECIPE), tmp_path / "r")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "r").iterdir()}
    del modes[".lock"]
    assert set(modes) == {LAST, PREVIOUS, FINAL, RUN, LOG, PAGE}
    assert set(modes.values()) == {0o640}


# ---- what ends a run


def test_a_killed_worker_is_one_sentence_and_costs_no_step(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mfuser_plugins.datasets.streets import Streets

    run = begin("plain", "steps=5", "save_every=1000", "workers=1")
    train(tiny, run, tmp_path / "whole")
    original, parent, seen = Streets.__getitem__, os.getpid(), []

    def item(self: Streets, index: int) -> Any:
        if os.getpid() != parent:
            seen.append(index)
            if len(seen) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Streets, "__getitem__", item)
        with pytest.raises(DataError) as caught:
            train(tiny, run, tmp_path / "r")
    step = checkpoints.read(tmp_path / "r" / LAST).step
    assert 1 <= step <= 3
    assert re.fullmatch(
        r"a data-loader worker was killed, as the system does when memory .* runs out; lower "
        rf"workers .* \({step} steps are saved; fix it and --resume\)",
        str(caught.value),
    )
    train(tiny, run, tmp_path / "r", resume=True)
    assert same(tmp_path / "whole", tmp_path / "r")


def test_a_worker_killed_as_it_hands_over_a_batch(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mfuser.data.loading import TrainingStream

    def started(self: TrainingStream) -> Any:
        yield from [self.loader.collate_fn([self.crops[0]])]
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(TrainingStream, "_started", started)
    with pytest.raises(DataError, match=r"worker was killed, .* \(1 steps are saved; fix it"):
        train(tiny, begin("plain", "workers=1"), tmp_path / "r")


def test_what_explains_a_divergence_is_kept(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        train(tiny, begin("plain", "lr=1e30", "min_lr=0", "save_every=1000"), tmp_path / "r")
    assert json.loads((tmp_path / "r" / RUN).read_text())["recipe"]["lr"] == 1e30
    assert steps(tmp_path / "r")[0] == 1


@pytest.mark.parametrize("sampling", [(), ("rare_classes={min_pixels=50}",)])
def test_labels_that_are_all_ignored(
    tiny: Registry,
    begin: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampling: tuple[str, ...],
) -> None:
    from mfuser_plugins.datasets.streets import Streets

    monkeypatch.setenv("MFUSER_CACHE_DIR", str(tmp_path / "cache"))
    original = Streets.__getitem__

    def blank(self: Streets, index: int) -> Any:
        sample = original(self, index)
        return type(sample)(sample.image, np.full_like(sample.label, IGNORE), sample.name)

    monkeypatch.setattr(Streets, "__getitem__", blank)
    monkeypatch.setattr(Streets, "label", lambda self, index: self[index].label)
    monkeypatch.setattr(Streets, "fingerprint", lambda self: "blank")
    with pytest.raises(DataError, match="^dataset 'toy': none of its 6 labels shows a class of"):
        train(tiny, begin("plain", *sampling), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_crops_that_are_all_ignored(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that show a class, but never where a crop of the enlarged image lies."""
    from mfuser.data.transforms import Augmentation

    original = Augmentation.__call__

    def cropped(self: Augmentation, *arguments: Any) -> Any:
        image, label = original(self, *arguments)
        return image, np.full_like(label, IGNORE)

    monkeypatch.setattr(Augmentation, "__call__", cropped)
    with pytest.raises(DataError, match="^dataset 'toy': its first 20 crops of 64x96 .* ignored"):
        train(tiny, begin("plain"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


# ---- the recipe


def test_fewer_steps_warm_up_in_proportion(mfuser: Any, write_registry: Any, inside: Path) -> None:
    registry = write_registry("[recipe.long]\nextends = 'tiny'\nsteps = 1000\nwarmup = 250\n")
    command = ("train", "plain", "--recipe", "long", "--registry", registry, "--no-evaluate")
    outcome = mfuser(*command, "--steps", 8, "--out", "r")
    assert outcome.code == 0, outcome.err
    assert (
        "recipe 'long' warms up for 250 of 1000 steps; with 8 steps it warms up for 2"
        in outcome.err
    )
    recipe = json.loads((inside / "r" / RUN).read_text())["recipe"]
    assert (recipe["steps"], recipe["warmup"]) == (8, 2)
    first, last = (json.loads(s) for s in (inside / "r/log.jsonl").read_text().splitlines())
    assert first["lr"] == pytest.approx(5e-4, rel=1e-3)
    # A warm-up that fits stays, and one that is asked for is not touched.
    outcome = mfuser(*command, "--steps", 300, "--set-recipe", "warmup=400", "--out", "s")
    assert outcome.code == 2 and "warmup" in outcome.err
    from mfuser import load_registry
    from mfuser.engine.run import resolve

    run = resolve(load_registry(registry), "plain", "long", recipe_settings=["steps=300"])
    assert run.recipe.warmup == 250


# ---- predictions


def test_a_mask_never_stands_without_its_overlay(
    tiny: Registry, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mfuser.engine.predict import predict

    photograph, out = tmp_path / "street.png", tmp_path / "out"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(
        photograph
    )
    replace = os.replace

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    def run(stop: int) -> set[str]:
        calls: list[Path] = []

        def counted(source: Any, target: Any) -> None:
            calls.append(target)
            (die if len(calls) == stop else replace)(source, target)

        monkeypatch.setattr(os, "replace", counted)
        for file in out.glob("*"):
            file.unlink()
        with contextlib.suppress(KeyboardInterrupt):
            predict(tiny, trained, [photograph], out)
        return {p.name for p in out.iterdir()}

    left = [run(stop) for stop in (1, 2, 3, 4)]
    overlay, mask, legend = "street.overlay.png", "street.mask.png", "legend.png"
    assert left == [set(), {overlay}, {overlay, mask}, {overlay, mask, legend}]
