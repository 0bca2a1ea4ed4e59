"""TensorBoard, W&B and MLflow: what reaches them, resumed runs, and that none ends a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mfuser import MFuserError, Registry
from mfuser.engine import checkpoints, trackers
from mfuser.engine.checkpoints import FINAL
from mfuser.engine.folder import KNOWN, PAGE
from mfuser.engine.live import Live
from mfuser.engine.trackers import Tracker
from mfuser.engine.train import train

RECIPE = ("validate_every=4", "validate_images=2")


def test_tensorboard_has_curves_and_pictures(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny, begin("plain", "tracker=tensorboard", *RECIPE), tmp_path / "r")
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 4]
    assert [e.step for e in events.Scalars("validation/miou")] == [4]
    assert len(events.Tags()["images"]) == 2
    (picture,) = events.Images(events.Tags()["images"][0])
    assert (picture.height, picture.width) == (64, 3 * 96)


def test_one_that_fails_is_one_warning(
    tiny: Registry,
    begin: Any,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of a training: a tracker without network, a page on a full disk."""
    pytest.importorskip("tensorboard")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tracker, "log", full)
    monkeypatch.setattr(Live, "saved", full)
    train(tiny, begin("plain", "tracker=tensorboard"), tmp_path / "r")
    said = capsys.readouterr().err
    for name in ("tensorboard", PAGE):
        assert said.count(f"{name} has failed and is left out from here on") == 1
    a, b = (checkpoints.read(f / FINAL).model for f in (trained, tmp_path / "r"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_missing_package_is_named_with_its_extra(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow", "tensorboard"):
        with pytest.raises(MFuserError, match=rf'pip install "mfuser\[{name}\]"'):
            train(tiny, begin("plain", f"tracker={name}"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_one_that_cannot_start_ends_the_run_before_it_begins(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")

    def offline(*_: object) -> None:
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(Tracker, "_tensorboard", offline)
    with pytest.raises(MFuserError, match="^tracker 'tensorboard' does not start: no network;"):
        train(tiny, begin("plain", "tensorboard=true"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_mlflow_in_a_store_of_files(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database, the default, takes it ten seconds to lay out."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    folder = tmp_path / "r"
    train(tiny, begin("plain", "tracker=mlflow", *RECIPE), folder)
    known = json.loads((folder / KNOWN).read_text())["mlflow"]
    run = mlflow.get_run(known)
    assert run.info.run_name == "r" and run.info.status == "FINISHED"
    assert {"loss", "lr", "validation/miou"} <= set(run.data.metrics)
    options = run.data.params
    assert options["recipe.steps"] == "4" and options["pairing.decoder.name"] == "linear"
    assert len(list(tmp_path.rglob("examples/*/00000004.png"))) == 2


def test_wandb_without_network(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "r"
    train(tiny, begin("plain", "tracker=wandb", *RECIPE), folder)
    known = json.loads((folder / KNOWN).read_text())["wandb"]
    (store,) = folder.rglob("*.wandb")
    assert store.name == f"run-{known}.wandb" and store.stat().st_size > 0
    content = store.read_bytes()
    assert b"validation/miou" in content and b"loss" in content
    assert len(list(folder.rglob("*.png"))) == 2
