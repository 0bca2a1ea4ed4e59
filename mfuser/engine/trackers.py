"""TensorBoard, Weights & Biases and MLflow, by Accelerate's trackers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mfuser.config.run import RunSpec
from mfuser.engine.folder import DATABASE, KNOWN
from mfuser.engine.validate import Seen
from mfuser.errors import MFuserError, MissingExtraError, brief
from mfuser.files import write_json

PROJECT = "mfuser"


def check(names: Sequence[str]) -> None:
    """Raises MissingExtraError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, name, f"tracker = '{name}' in the recipe")


class Tracker:
    """One of them, told by the first process."""

    def __init__(self, name: str, folder: Path, run: RunSpec) -> None:
        self.name, self.folder, self.run = name, folder, run
        self._tracker: Any = None
        self._undo = contextlib.ExitStack()

    def begin(self, start: int, lines: Sequence[dict[str, Any]]) -> None:
        """Raises MFuserError where it cannot be reached or is not logged in."""
        opened = {"tensorboard": self._tensorboard, "wandb": self._wandb, "mlflow": self._mlflow}
        try:
            self._tracker = opened[self.name](start)
            if self.name != "tensorboard":  # which would make a folder for them
                self._tracker.store_init_configuration(_flat(self.run.model_dump(mode="json")))
        except Exception as error:
            self._undo.close()
            remedy = {
                "wandb": "set WANDB_MODE=offline",
                "mlflow": "set MLFLOW_TRACKING_URI to a server or database that is there",
            }.get(self.name, "see that the run's folder can be written")
            raise MFuserError(
                f"tracker '{self.name}' does not start: {brief(error)}; {remedy}, or leave it out"
            ) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        self._tracker.log(values, step=step)

    def validated(self, seen: Seen) -> None:
        figures = {"miou": seen.miou, "accuracy": seen.accuracy}
        figures |= {f"iou/{_plain(name)}": value for name, value in seen.iou.items()}
        self._tracker.log({f"validation/{k}": v for k, v in figures.items()}, step=seen.step)
        for example in seen.examples:
            beside = np.concatenate([example.image, example.target, example.prediction], axis=1)
            name = f"examples/{_plain(example.name)}"
            if self.name == "mlflow":  # Accelerate's has no pictures
                import mlflow

                mlflow.log_image(beside, f"{name}/{seen.step:08d}.png")
            elif self.name == "wandb":
                self._tracker.log_images({name: [beside]}, step=seen.step)
            else:
                self._tracker.log_images({name: beside[None]}, step=seen.step, dataformats="NHWC")

    def saved(self) -> None:
        pass

    def close(self) -> None:
        try:
            if self._tracker is not None:
                self._tracker.finish()
        finally:
            self._undo.close()

    def _tensorboard(self, start: int) -> Any:
        from accelerate.tracking import TensorBoardTracker

        # TensorBoard forgets the events of later steps that are in earlier files.
        again = start + 1 if (self.folder / "tensorboard").is_dir() else None
        return _started(TensorBoardTracker("tensorboard", str(self.folder), purge_step=again))

    def _wandb(self, start: int) -> Any:
        import wandb
        from accelerate.tracking import WandBTracker

        return _started(
            WandBTracker(
                PROJECT,
                name=self.folder.resolve().name,
                id=self._known(lambda: secrets.token_hex(8)),
                resume="allow",
                dir=str(self.folder),
                settings=wandb.Settings(silent=True, console="off"),
            )
        )

    def _mlflow(self, start: int) -> Any:
        os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        import mlflow
        from accelerate.tracking import MLflowTracker

        said = logging.getLogger("mlflow")  # every table of a new database
        self._undo.callback(said.setLevel, said.level)
        said.setLevel(logging.WARNING)
        artifacts = None
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._undo.callback(mlflow.set_tracking_uri, mlflow.get_tracking_uri())
            place = self.folder.resolve()
            mlflow.set_tracking_uri(f"sqlite:///{place / DATABASE}")
            artifacts = (place / "mlflow").as_uri()
        name, known = self.folder.resolve().name, self._read().get("mlflow")
        tracker = _started(MLflowTracker(PROJECT, artifacts, run_id=known, run_name=name))
        self._known(lambda: str(tracker.tracker.info.run_id))
        return tracker

    def _known(self, new: Callable[[], str]) -> str:
        """The tracker's id of the run, so that a resumed run continues the same curves."""
        known = self._read()
        if self.name not in known:
            known[self.name] = new()
            write_json(self.folder / KNOWN, known)
        return known[self.name]

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads((self.folder / KNOWN).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _started(tracker: Any) -> Any:
    if hasattr(tracker, "start"):  # earlier releases of Accelerate start when they are made
        tracker.start()
    return tracker


def _flat(table: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists as text."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value if isinstance(value, bool | int | float) else str(value)
    return flat


def _plain(name: str) -> str:
    """A name that every tracker takes."""
    return "".join(c if c.isalnum() or c in "_-. " else "-" for c in name)
