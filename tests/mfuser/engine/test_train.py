"""Training: repeatable, resumable to the bit, and never at the cost of what was there."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from forked import training
from stopping import gone_in, interrupted_in

from mfuser import Registry, build_model
from mfuser.data.loading import ClassMap, CropSource, training_stream
from mfuser.data.sampling import ShuffledSampler
from mfuser.data.transforms import Augmentation, AugmentationSpec
from mfuser.engine import checkpoints, processes
from mfuser.engine.folder import RUN, read_run
from mfuser.engine.train import parameter_groups, train
from mfuser.errors import CheckpointError, MFuserError


def weights(folder: Path, name: str = checkpoints.FINAL) -> dict[str, torch.Tensor]:
    return checkpoints.read(folder / name).model


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


# ---- the same weights


def test_one_seed_gives_identical_weights(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)  # the state of the caller's generator does not matter
        train(tiny, begin("tiny", "steps=2", f"seed={seed}"), tmp_path / name)
    a, b, c = (weights(tmp_path / n) for n in "abc")
    assert same(a, b) and not same(a, c)
    start = checkpoints.trained_state(build_model("tiny", tiny))
    moved = [k for k in a if not torch.equal(a[k], start[k])]
    # Weight decay of 1e-5 leaves some values of normalization and bias where they were.
    assert len(moved) > 0.8 * len(a)


@pytest.mark.parametrize("recipe", [(), ("accumulate=2",), ("rare_classes={min_pixels=50}",)])
def test_stopped_and_resumed_equals_never_stopped(
    tiny: Registry,
    begin: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: tuple[str, ...],
) -> None:
    monkeypatch.setenv("MFUSER_CACHE_DIR", str(tmp_path / "cache"))
    run = begin("plain", "steps=5", "save_every=2", *recipe)
    train(tiny, run, tmp_path / "whole")
    with interrupted_in(3):
        train(tiny, run, tmp_path / "parts")
    assert checkpoints.read(tmp_path / "parts" / checkpoints.LAST).step == 3
    assert not (tmp_path / "parts" / checkpoints.FINAL).exists()
    noted = run.recipe.model_copy(update={"note": "What reports say may change."})
    train(tiny, run.model_copy(update={"recipe": noted}), tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole = checkpoints.read(tmp_path / "whole" / checkpoints.LAST)
    parts = checkpoints.read(tmp_path / "parts" / checkpoints.LAST)
    assert same(whole.optimizer, parts.optimizer) and whole.optimizer


def test_the_loss_scale_of_float16_comes_back(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler as float16 has it, in float32 on the CPU."""
    accelerator = processes._accelerator
    scaler: dict[str, Any] = {"growth_factor": 1.7, "growth_interval": 2}

    def scaled(*arguments: Any) -> Any:
        made = accelerator(*arguments)
        made.scaler = torch.amp.GradScaler("cpu", **scaler)
        return made

    monkeypatch.setattr(processes, "_accelerator", scaled)
    run = begin("plain", "steps=5", "save_every=3")
    train(tiny, run, tmp_path / "whole")
    with interrupted_in(3):
        train(tiny, run, tmp_path / "parts")
    train(tiny, run, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    states = [
        checkpoints.read(tmp_path / name / checkpoints.LAST).meta["scaler"]
        for name in ("whole", "parts")
    ]
    assert states[0] == states[1]
    assert states[0]["scale"] == pytest.approx(2**16 * 1.7**2) and states[0]["_growth_tracker"] == 1
    assert "scaler" not in checkpoints.read(tmp_path / "parts" / checkpoints.FINAL).meta

    # A scale so large that the first step is skipped: there is no state of the optimizer yet.
    scaler["init_scale"] = 1e38
    with interrupted_in(1):
        train(tiny, run, tmp_path / "skipped")
    assert not checkpoints.read(tmp_path / "skipped" / checkpoints.LAST).optimizer
    train(tiny, run, tmp_path / "skipped", resume=True)
    resumed = checkpoints.read(tmp_path / "skipped" / checkpoints.LAST)
    assert resumed.step == 5 and all(v.isfinite().all() for v in resumed.model.values())


def test_killed_between_checkpoints_resumes_from_the_last_whole_one(
    tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    run = begin("plain", "steps=5", "save_every=2")
    train(tiny, run, tmp_path / "whole")

    with gone_in(4):
        train(tiny, run, tmp_path / "killed")
    assert checkpoints.read(tmp_path / "killed" / checkpoints.LAST).step == 2
    train(tiny, run, tmp_path / "killed", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_killed_between_the_last_two_files(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    run = begin()
    train(tiny, run, tmp_path / "r")
    final = weights(tmp_path / "r")
    (tmp_path / "r" / checkpoints.FINAL).unlink()
    train(tiny, run, tmp_path / "r", resume=True)
    assert same(final, weights(tmp_path / "r"))


def test_workers_draw_the_same_crops(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    """Also after OpenCV has worked here, whose threads do not outlive the fork of a worker."""
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((1000, 1000, 3), np.uint8), (9, 9), 3)
    train(tiny, begin("plain"), tmp_path / "none")
    train(tiny, begin("plain", "workers=2"), tmp_path / "two")
    assert same(weights(tmp_path / "none"), weights(tmp_path / "two"))


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(write_registry: Any, tmp_path: Path) -> None:
    """A whole process group is interrupted, loader workers and all."""
    process = training(write_registry(), tmp_path, steps=400)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    found = re.search(r"interrupted after step (\d+); all is saved in run", err)
    assert found, err
    stopped = checkpoints.read(tmp_path / "run" / checkpoints.LAST)
    assert stopped.step == int(found[1]) < 400
    again = err.strip().splitlines()[-1].split()
    assert again[:3] == ["mfuser", "train", "plain"] and again[-1] == "--resume"


# ---- the folder


def test_what_a_run_leaves(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    run = begin()
    folder = tmp_path / "deep" / "run"
    model = train(tiny, run, folder).model
    assert not model.training
    assert set(os.listdir(folder)) == {
        ".lock",
        checkpoints.LAST,
        checkpoints.PREVIOUS,
        "log.jsonl",
        "progress.html",
        checkpoints.FINAL,
        RUN,
    }
    assert read_run(tiny, folder).pairing == tiny.pairing("plain")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4]
    assert lines[0]["loss"] == pytest.approx(
        sum(v for k, v in lines[0].items() if k.startswith("loss_")), rel=1e-6
    )
    meta = checkpoints.read(folder / checkpoints.FINAL).meta
    assert meta["step"] == 4 and meta["run"]["source"]["name"] == "toy"
    assert meta["run"]["most_frequent"] in tiny.pairing("plain").classes


def test_a_folder_with_another_run_is_left_alone(
    tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    train(tiny, begin(), tmp_path / "r")
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    for run, resume, message in (
        (begin(), False, "already holds a run .'plain', recipe 'tiny'.*--resume"),
        (begin("lone"), False, "already holds a run"),
        (begin("lone"), True, r"holds another run: its pairing\.vlm is .* not None"),
        (begin("plain", "lr=1e-4"), True, r"recipe\.lr is 0\.001, not 0\.0001"),
        (begin("plain", "seed=3"), True, r"recipe\.seed is 0, not 3"),
        (begin("plain", source="toy-night"), True, "source is 'toy', not 'toy-night'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(tiny, run, tmp_path / "r", resume=resume)
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before


def test_what_does_not_decide_the_weights_may_change(
    tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    train(tiny, begin(), tmp_path / "whole")
    with interrupted_in(2):
        train(tiny, begin(), tmp_path / "parts")
    changed = begin("plain", "workers=1", "on_bad_image=skip", "save_every=3")
    train(tiny, changed, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_folders_that_are_no_runs(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for folder, resume, message in (
        ("full", False, "is not empty and holds no run; choose another --out"),
        ("full", True, "holds no run to resume"),
        ("none", True, "holds no run to resume"),
        ("file", False, "cannot be written: a file of that name is there"),
        ("file/below", False, "cannot be written"),
        ("/proc/mfuser", False, "the folder /proc/mfuser cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(tiny, begin(), tmp_path / folder, resume=resume)
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_a_damaged_record_of_the_run(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    train(tiny, begin(), tmp_path / "r")
    record = tmp_path / "r" / RUN
    for text in ("{", "[]", '{"pairing_name": 3}', record.read_text()[:-50]):
        record.write_text(text)
        with pytest.raises(
            CheckpointError, match=r"run\.json( cannot be read|: | is not the record)"
        ) as caught:
            train(tiny, begin(), tmp_path / "r", resume=True)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_run_is_not_resumed(
    tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    train(tiny, begin(), tmp_path / "r")
    train(tiny, begin("lone"), tmp_path / "other")
    last = tmp_path / "r" / checkpoints.LAST
    last.write_bytes((tmp_path / "other" / checkpoints.LAST).read_bytes())
    with pytest.raises(CheckpointError, match="is of another pairing than the run in"):
        train(tiny, begin(), tmp_path / "r", resume=True)
    last.write_bytes((tmp_path / "r" / checkpoints.FINAL).read_bytes())
    with pytest.raises(CheckpointError, match="holds no state of the optimizer"):
        train(tiny, begin(), tmp_path / "r", resume=True)


def test_a_run_begun_before_an_option_was_there_is_resumed(
    tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    with interrupted_in(3):
        train(tiny, begin(), tmp_path / "r")
    last = tmp_path / "r" / checkpoints.LAST
    checkpoint = checkpoints.read(last)
    pairing = checkpoint.meta["pairing"]
    assert pairing["pyramid"].pop("resize") == "trained"
    assert pairing["vfm"].pop("dtype") == "float32"
    checkpoints.write(last, checkpoint)
    train(tiny, begin(), tmp_path / "r", resume=True)
    assert checkpoints.read(last).step == 4


# ---- the recipe


def test_parameter_groups_by_decay_and_place(tiny: Registry) -> None:
    model = build_model("plain", tiny, vfm={"freeze": False})
    recipe = tiny.recipe("tiny", ["backbone_lr=0.1", "weight_decay=0.05"])
    groups = parameter_groups(model, recipe)
    names = {p: n for n, p in model.named_parameters()}
    placed = {names[p]: (g["weight_decay"], g["factor"]) for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    assert set(placed) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert placed["decoder.norm.weight"] == (0.0, 1.0)
    assert placed["decoder.classify.weight"] == (0.05, 1.0)
    assert placed["encoder.vfm.model.blocks.0.norm1.weight"] == (0.0, 0.1)
    assert placed["encoder.vfm.model.blocks.0.attn.qkv.weight"] == (0.05, 0.1)


def test_nothing_to_train(tiny: Registry) -> None:
    model = build_model("lone", tiny)
    model.requires_grad_(False)
    with pytest.raises(MFuserError, match="nothing in this pairing trains"):
        parameter_groups(model, tiny.recipe("tiny"))


def test_two_precisions_in_one_process(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    train(tiny, begin("plain"), tmp_path / "a")
    train(tiny, begin("plain", "precision=bf16"), tmp_path / "b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert not same(a, b) and {t.dtype for t in b.values() if t.is_floating_point()} == {
        torch.float32
    }


def test_gradients_are_accumulated(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    """Two crops in two batches or in one: the same step, without normalization over the batch."""
    fixed = ("augmentation={scale=[1.0, 1.0], photometric=false, flip=0.0}", "steps=1", "warmup=0")
    train(tiny, begin("tiny", "accumulate=2", *fixed), tmp_path / "two")
    train(tiny, begin("tiny", "accumulate=1", *fixed), tmp_path / "one")
    assert not same(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert read_run(tiny, tmp_path / "two").recipe.accumulate == 2


def test_a_run_continues_its_epoch(tiny: Registry) -> None:
    """The stream from a later start gives the batches that the whole one gives there."""
    dataset = tiny.dataset("toy").build(None, "train")
    model_classes = tiny.pairing("plain").classes

    def stream(start: int) -> list[Any]:
        return list(
            training_stream(
                [
                    CropSource(
                        dataset, ClassMap(dataset, model_classes), ShuffledSampler(len(dataset))
                    )
                ],
                Augmentation(AugmentationSpec(), (64, 96)),
                seed=4,
                steps=9,
                batch_size=2,
                start=start,
            )
        )

    whole, later = stream(0), stream(5)
    assert len(whole) == 9 and len(later) == 4
    for one, other in zip(whole[5:], later, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert one.images.dtype == torch.uint8 and one.labels.dtype == torch.uint8
        assert one.to(torch.device("cpu"))[1].dtype == torch.int64
