"""The folder of a run: what it holds, and who may begin or go on in it.

runs/NAME/run.json            pairing, recipe, domains and seed, resolved
          last.safetensors    to resume from, previous.safetensors the one before it
          model.safetensors   the finished model; averaged, best: its averages, the best so far
          log.jsonl           loss and rate, a line per logged step; what was measured on the way
          progress.html       the same as curves, and examples, while it trains
          report.{json,md,csv}, pictures/
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Literal

from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec
from mfuser.engine.lock import locked
from mfuser.engine.runfiles import RUN as RUN
from mfuser.errors import CheckpointError
from mfuser.files import TEMPORARY, check_writable, clear_leftovers, write_json

LOG = "log.jsonl"
PAGE = "progress.html"
KNOWN = "trackers.json"
DATABASE = "mlflow.db"
TRACKED = ("tensorboard", "wandb", "mlflow")
"""Folders of trackers."""
LOCK = ".lock"
FREE = (
    *("on_bad_image", "workers", "prefetch", "save_every", "checkpointing", "shard"),
    *("tracker", "tensorboard", "note"),
)
"""Keys of a recipe that may change when a run goes on: its weights do not depend on them."""
BATCH = ("batch_size", "accumulate")
"""Keys that may change together with the number of processes, where a step keeps its crops."""

Resume = bool | Literal["auto"]
"""Whether to go on in a folder; "auto": if it holds a run."""


def resumes(folder: Path, asked: Resume) -> bool:
    """Whether a run goes on, now that its folder can be looked at."""
    return (folder / RUN).is_file() if asked == "auto" else bool(asked)


def check_folder(registry: Registry, folder: Path, run: RunSpec, resume: bool) -> RunSpec:
    """Whether a run may begin or go on in a folder; returns the run as it was begun.

    Raises CheckpointError if the folder holds something else. Nothing is written.
    """
    file = folder / RUN
    if file.is_file():
        begun = read_run(registry, folder)
        if not resume:
            raise CheckpointError(
                f"{folder} already holds a run ('{begun.pairing_name}', recipe "
                f"'{begun.recipe_name}'); continue it with --resume or choose another --out"
            )
        free = {key: getattr(run.recipe, key) for key in (*FREE, *BATCH)}
        changed = begun.recipe.model_copy(update=free)
        was = begun.model_copy(update={"recipe": changed, "world": run.world})
        differing = [
            key
            for key in ("pairing", "recipe", "sources", "seed")
            if getattr(was, key) != getattr(run, key)
        ]
        if differing:
            raise CheckpointError(
                f"{folder} holds another run: its {_difference(was, run, differing[0])}; resume "
                "with the same settings or choose another --out"
            )
        if begun.batch != run.batch:
            raise CheckpointError(
                f"{folder} was begun with {_crops(begun)}, and this run has {_crops(run)}: "
                f"{_same_batch(begun.batch, run)}"
            )
        return begun
    if resume:
        raise CheckpointError(f"{folder} holds no run to resume (there is no {RUN})")
    if folder.is_dir() and not all(_of_a_start(file.name) for file in folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty and holds no run; choose another --out")
    return run


def _of_a_start(name: str) -> bool:
    """Whether it is what a run leaves that was killed before it had written anything."""
    return name.startswith(LOCK) or TEMPORARY.fullmatch(name) is not None


def lock_folder(folder: Path) -> contextlib.AbstractContextManager[None]:
    """One training at a time. Raises InUse naming the process that is there."""
    return locked(folder / LOCK, f"the run folder {folder}")


def check_unlocked(folder: Path) -> None:
    """Raises InUse early, before anything that takes time; nothing is kept locked."""
    if (folder / LOCK).is_file():
        with lock_folder(folder):
            pass


def open_folder(
    registry: Registry, folder: Path, run: RunSpec, resume: bool, held: contextlib.ExitStack
) -> RunSpec:
    """Make or reopen a run's folder; returns the run as it was begun. held: keeps it locked.

    Raises CheckpointError as `check_folder` does, or if the folder cannot be written.
    """
    if not folder.is_dir():
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock_folder(folder))
    clear_leftovers(folder)
    run = check_folder(registry, folder, run, resume)  # again: nobody else changes it any more
    if not (folder / RUN).is_file():
        write_json(folder / RUN, run.model_dump(mode="json"))
    return run


def clear_folder(folder: Path) -> None:
    """Undo `open_folder` for a run that failed before there was anything to keep."""
    for name in TRACKED:
        shutil.rmtree(folder / name, ignore_errors=True)
    for file in (
        *(folder / name for name in (RUN, LOG, PAGE, KNOWN, DATABASE)),
        *folder.glob(f"{LOCK}*"),
    ):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: the rest is somebody else's
        folder.rmdir()


def read_run(registry: Registry, folder: Path) -> RunSpec:
    """The run that a folder holds. Raises CheckpointError if there is none, if it cannot be read,
    or if it needs a plugin that is not there."""
    file = folder / RUN
    try:
        table = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no run (there is no {RUN})") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return RunSpec.read(registry, table, str(file))


def _crops(run: RunSpec) -> str:
    processes = f"{run.world} process{'es' if run.world > 1 else ''}"
    return (
        f"{run.batch} crops a step (batch_size {run.recipe.batch_size} x {processes} x accumulate "
        f"{run.recipe.accumulate})"
    )


def _same_batch(wanted: int, run: RunSpec) -> str:
    """How to go on with so many crops a step."""
    recipe = run.recipe
    for key, others in (
        ("batch_size", run.world * recipe.accumulate),
        ("accumulate", run.world * recipe.batch_size),
    ):
        if wanted % others == 0:
            return f"resume with --set-recipe {key}={wanted // others}"
    return f"resume with a number of processes that divides {wanted}"


def _difference(begun: RunSpec, run: RunSpec, key: str) -> str:
    old, new = getattr(begun, key), getattr(run, key)
    if isinstance(old, PairingSpec | RecipeSpec):
        was, now = old.model_dump(mode="json"), new.model_dump(mode="json")
        changed = next(k for k in was | now if was.get(k) != now.get(k))
        return f"{key}.{changed} is {was.get(changed)!r}, not {now.get(changed)!r}"
    if key == "sources":
        return f"source is {begun.source_names!r}, not {run.source_names!r}"
    return f"{key} is {old!r}, not {new!r}"
