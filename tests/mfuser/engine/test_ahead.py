"""Threads beside the device: the same results, errors and files as without."""

from __future__ import annotations

import errno
import os
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd import photo

from mfuser import MFuserError, Registry
from mfuser.config.run import domains
from mfuser.data import images
from mfuser.data.images import UnreadableImage
from mfuser.engine import ahead as module
from mfuser.engine import measure
from mfuser.engine.ahead import MOST, ahead, workers_of
from mfuser.engine.evaluate import evaluate
from mfuser.engine.predict import predict
from mfuser.errors import DataError
from mfuser.interfaces import Sample
from mfuser.model.dgss import DGSSModel
from mfuser_plugins.datasets.streets import Streets

# ---- the threads themselves


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_and_errors_come_in_their_turn(workers: int) -> None:
    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item * item

    found: list[object] = []
    with ahead(range(20), work, workers) as results:
        for result in results:
            try:
                found.append(result())
            except ValueError as error:
                found.append(str(error))
    assert found == [i * i if i != 5 else "five" for i in range(20)]


@pytest.mark.parametrize("workers", [1, 3])
def test_few_results_wait_and_the_rest_is_never_begun(workers: int) -> None:
    begun: list[int] = []
    with ahead(range(1000), begun.append, workers, waiting=2) as results:
        for done, result in enumerate(results):
            result()
            assert len(begun) <= done + 1 + workers + 2
            if done == 20:
                break
    assert len(begun) <= 21 + workers + 2
    assert not [t for t in threading.enumerate() if t.name.startswith("mfuser-ahead")]


def test_a_core_is_left_to_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(cores: int, here: int = 1) -> int:
        monkeypatch.setattr(module, "_cores", lambda: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        return workers_of(None)

    assert [on(1), on(2), on(3), on(64)] == [0, 1, 2, MOST]
    assert [on(8, here=8), on(16, here=8)] == [0, 1]
    assert workers_of(0) == 0 and workers_of(7) == 7


# ---- evaluation


def test_an_evaluation_is_the_same_to_the_last_digit(tiny: Registry, trained: Path) -> None:
    reports = [evaluate(tiny, trained, limit=6, workers=workers).as_json() for workers in (0, 1, 3)]
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_it_in_the_same_words(
    mfuser: Any,
    write_registry: Any,
    trained: Path,
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    read = Streets.__getitem__

    def cut(self: Streets, index: int) -> Sample:
        if index == 3:
            raise UnreadableImage("street3.png cannot be read: cut short")
        return read(self, index)

    monkeypatch.setattr(Streets, "__getitem__", cut)
    write_registry()
    command = ("evaluate", trained, "--targets", "toy", "--limit", 6, "--workers", workers)
    ended = mfuser(*command, "--out", inside / "out")
    assert ended.code == 2
    assert ended.err.strip().splitlines()[-1] == "mfuser: street3.png cannot be read: cut short"
    assert not (inside / "out").exists()


def test_ctrl_c_while_a_thread_reads(
    mfuser: Any, write_registry: Any, trained: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Streets.__getitem__

    def interrupted(self: Streets, index: int) -> Sample:
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, index)

    monkeypatch.setattr(Streets, "__getitem__", interrupted)
    write_registry()
    out = ("--out", inside / "out")
    assert mfuser("evaluate", trained, "--limit", 6, "--workers", 1, *out).code == 130
    assert not [t for t in threading.enumerate() if t.name.startswith("mfuser-ahead")]


def test_memory_is_flat_however_many_images(
    tiny: Registry, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 60
    images: set[int] = set()
    scores: set[int] = set()
    most: list[int] = []
    held: list[int] = []
    segment = DGSSModel.segment_by
    target = domains(tiny, "toy")[0]
    first = target.build(tiny, "val")[0]

    def counted(self: Streets, index: int) -> Sample:
        image = np.array(first.image)
        images.add(index)
        weakref.finalize(image, images.discard, index)
        most.append(len(images))
        return Sample(image, first.label, str(index))

    def seen(self: DGSSModel, inference: Any, pixels: torch.Tensor, **given: Any) -> torch.Tensor:
        held.append(len(scores))
        found = segment(self, inference, pixels, **given).numpy().copy()
        scores.add(len(held))
        weakref.finalize(found, scores.discard, len(held))
        return torch.from_numpy(found)  # its views, too, keep the array

    monkeypatch.setattr(Streets, "__getitem__", counted)
    monkeypatch.setattr(Streets, "__len__", lambda self: count)
    monkeypatch.setattr(DGSSModel, "segment_by", seen)
    monkeypatch.setattr(measure, "SCORES", 1)  # as if these were large frames
    report = evaluate(tiny, trained, targets=[target], limit=count, workers=1)
    assert report.domains["toy"].images == count == len(held)
    assert set(held) == {0}  # the scores of the image before are gone
    # One being read and TOGETHER read ahead; one asked; one counted and WAITING to be.
    assert max(most) <= 1 + measure.TOGETHER + 1 + 1 + module.WAITING + 1


@pytest.mark.parametrize("least, sizes", [(1, [1] * 6), (2**30, [4, 2])])
def test_small_images_are_segmented_together(
    tiny: Registry, trained: Path, monkeypatch: pytest.MonkeyPatch, least: int, sizes: list[int]
) -> None:
    found: list[int] = []
    segment = DGSSModel.segment_by

    def seen(self: DGSSModel, inference: Any, pixels: torch.Tensor, **given: Any) -> torch.Tensor:
        found.append(len(pixels))
        return segment(self, inference, pixels, **given)

    monkeypatch.setattr(DGSSModel, "segment_by", seen)
    monkeypatch.setattr(measure, "SCORES", least)
    evaluate(tiny, trained, targets=None, limit=6)
    assert found == sizes * 2


def test_texts_are_computed_once(
    tiny: Registry, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    text = DGSSModel.text

    def counted(self: DGSSModel) -> torch.Tensor:
        calls.append(1)
        return text(self)

    monkeypatch.setattr(DGSSModel, "text", counted)
    report = evaluate(tiny, trained)
    assert len(report.domains) == 2 and len(calls) == 1
    calls.clear()
    predict(tiny, trained, [photo(tmp_path / f"{k}.png") for k in range(3)], tmp_path / "out")
    assert len(calls) == 1


# ---- prediction


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photographs"
    folder.mkdir()
    return [photo(folder / f"{k}.png", (100 + 4 * k, 70)) for k in range(5)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_files_however_many_threads(
    tiny: Registry, trained: Path, photographs: list[Path], tmp_path: Path
) -> None:
    def entries(out: Path, **options: Any) -> list[Any]:
        written = predict(tiny, trained, photographs, out, scores="npz", **options)
        return [entry["classes"] for entry in written]

    one, two = tmp_path / "one", tmp_path / "two"
    assert entries(one, workers=0) == entries(two, workers=2)
    assert contents(one) == contents(two) and len(contents(one)) == 3 * 5 + 1


@pytest.mark.parametrize("workers", [0, 1])
def test_photographs_are_read_once(
    tiny: Registry,
    trained: Path,
    photographs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    read: list[Path] = []
    load = images._load

    def counted(path: Path) -> Any:
        read.append(path)
        return load(path)

    monkeypatch.setattr(images, "_load", counted)
    predict(tiny, trained, photographs, tmp_path / "out", workers=workers)
    assert sorted(read) == photographs
    # Those that do not fit are read again when their turn comes.
    read.clear()
    monkeypatch.setattr("mfuser.engine.predict.KEPT", 3 * 100 * 70)
    predict(tiny, trained, photographs, tmp_path / "again", workers=workers)
    assert sorted(read) == sorted([*photographs, *photographs[1:]])
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_ends_it_with_what_is_whole(
    tiny: Registry,
    trained: Path,
    photographs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name[0] >= "2":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"out cannot be written: .*No space left"):
        predict(tiny, trained, photographs, out, workers=workers)
    assert sorted(p.name for p in out.iterdir()) == [
        f"{k}.{kind}.png" for k in range(2) for kind in ("mask", "overlay")
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_precedes_an_error_is_written(
    tiny: Registry,
    trained: Path,
    photographs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    segment, calls = DGSSModel.segment_by, [0]

    def failing(self: DGSSModel, *given: Any, **named: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] in (4, 9):
            raise MFuserError("a part refuses")
        return segment(self, *given, **named)

    monkeypatch.setattr(DGSSModel, "segment_by", failing)
    with pytest.raises(MFuserError, match=r"3\.png: a part refuses"):
        predict(tiny, trained, photographs, tmp_path / "out", workers=workers)
    assert calls == [4]
    masks = sorted(p.name for p in (tmp_path / "out").glob("*.mask.png"))
    assert masks == ["0.mask.png", "1.mask.png", "2.mask.png"]
    written = predict(
        tiny, trained, photographs, tmp_path / "all", workers=workers, skip_unreadable=True
    )
    assert ["mask" in entry for entry in written] == [True] * 4 + [False]


# ---- windows


def test_the_commands_batch_windows(
    mfuser: Any, write_registry: Any, trained: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_registry()
    sizes: list[int] = []
    scores = DGSSModel.scores

    def seen(self: DGSSModel, windows: torch.Tensor, *given: Any) -> torch.Tensor:
        sizes.append(len(windows))
        return scores(self, windows, *given)

    monkeypatch.setattr(DGSSModel, "scores", seen)
    path = photo(inside / "a.png", (200, 100))
    command = ("predict", trained, path, "--out")
    assert mfuser(*command, inside / "one").code == 0
    assert sizes == [6]  # auto: of 64x96 on a CPU
    sizes.clear()
    assert mfuser(*command, inside / "each", "--window-batch", 1).code == 0
    assert sizes == [1] * 6
    sizes.clear()
    assert mfuser(*command, inside / "all", "--window-batch", 64).code == 0
    assert sizes == [6]
    assert contents(inside / "one") == contents(inside / "all") == contents(inside / "each")
    done = mfuser("evaluate", trained, "--window-batch", 3, "--out", inside / "report")
    assert done.code == 0 and "window_batch 3" in done.out
    refused = mfuser(*command, inside / "x", "--window-batch", 2, "--inference", "multi_scale_flip")
    assert refused.code == 2
    assert "--window-batch is of a sliding window, and inference 'multi_scale_flip'" in refused.err
    assert "--set inference.inner.window_batch=…" in refused.err
    for wrong in ("0", "-1", "many", "1.5"):
        refused = mfuser(*command, inside / "x", "--window-batch", wrong)
        assert refused.code == 2 and "a positive integer or auto" in refused.err
    assert not (inside / "x").exists()
