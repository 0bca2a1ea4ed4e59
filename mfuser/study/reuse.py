"""Runs that a study beside this one has finished: taken, not trained a second time.

A run's result follows from its `RunSpec` and from what `makers` lists: code, libraries, device,
data. The latter stands in VARIANT/seed0.made.json beside each run of a study; a run is taken only
where both are the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pkgutil
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec
from mfuser.engine.checkpoints import LAST
from mfuser.engine.folder import LOCK, RUN
from mfuser.engine.lock import holder, locked
from mfuser.errors import CheckpointError
from mfuser.files import CACHE, TEMPORARY, lives, write_json
from mfuser.reporting.adapter_cost import default_device
from mfuser.study.runs import STUDY, Job, training_job

TAKEN = "taken"
"""Key of the record of a run that was taken: from where, STUDY/VARIANT/seed0."""
LIBRARIES = (
    *("torch", "timm", "open_clip_torch", "transformers", "accelerate", "numpy", "scipy"),
    *("opencv-python", "opencv-python-headless", "pillow"),
)
NAMES = ("pairing_name", "recipe_name", "most_frequent", "source_classes", "precision")
"""Keys of a `RunSpec` that decide nothing, or follow from the others (the precision: from the
recipe and the device, and is written down only where the run begins)."""


def makers(registry: Registry, run: RunSpec, device: str | None) -> dict[str, Any]:
    """Everything beside its `RunSpec` that determines a run's result, as JSON."""
    device = device or default_device()
    data = sorted({d.spec.component() for d in (*run.sources, *run.targets) if d.spec})
    roots = {name: registry.root(name) for name in data}
    return {
        "code": _code(frozenset(one.spec.__module__ for one in registry.components)),
        "python": platform.python_version(),
        "libraries": {d: v for d in LIBRARIES if (v := _version(d)) is not None},
        "device": _hardware(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "variables": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith("MFUSER_") and key != CACHE
        },
        "roots": {name: str(root.absolute()) for name, root in roots.items() if root is not None},
        "files": dict(_files(run)),
    }


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return platform.machine() if device == "cpu" else f"{device} of {platform.machine()}"


def sign(folder: Path, made: dict[str, Any]) -> None:
    """Before a run is trained: write down what makes it. A run that was begun by something else is
    then of neither, and nobody takes it."""
    if (folder / LAST).is_file() and _read(record(folder)) != made:
        made = {"code": "several", "last": made}
    write_json(record(folder), made)


def record(folder: Path) -> Path:
    """The file beside a run's folder that says what made it."""
    return folder.with_name(f"{folder.name}.made.json")


def taken_from(folder: Path) -> str | None:
    """Where a study's run was taken from, STUDY/VARIANT/seed0; None where it was trained here."""
    found = _read(record(folder)).get(TAKEN)
    return str(found) if found is not None else None


def same_runs(jobs: Iterable[Job]) -> int:
    """How many different runs there are among jobs."""
    return len({json.dumps(_deciding(job.request["run"]), sort_keys=True) for job in jobs})


class Neighbors:
    """The runs in OUT and in the folders of studies beside it."""

    def __init__(self, out: Path, registry: Registry, device: str | None) -> None:
        self.beside, self.registry, self.device = out.absolute().parent, registry, device

    def finished(self, job: Job) -> Path | None:
        """The folder of a finished run that is the same as the job's, if there is one."""
        return next((f for f in self._same(job) if training_job("", f).finished()), None)

    def offer(self, job: Job) -> str | None:
        """From where a job's run would be taken, STUDY/VARIANT/seed0."""
        folder = None if job.folder.exists() else self.finished(job)
        if folder is None:
            return None
        return self._name(folder)

    def at_work(self, job: Job) -> str | None:
        """Who trains such a run at the moment, if anyone."""
        found = (_at_work(training_job("", folder).lock) for folder in self._same(job))
        return next((held for held in found if held is not None), None)

    def take(self, job: Job) -> str | None:
        """Copy a finished run of the same kind to the job's place; returns from where.

        Nothing is taken where the job has been begun. Raises InUse where another process has it.
        """
        if job.folder.exists() or (folder := self.finished(job)) is None:
            return None
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(job.lock, job.label):
            if job.folder.exists():
                return None
            source = self._name(folder)
            _clear(job.folder)
            part = job.folder.with_name(f".{job.folder.name}.{os.getpid()}.tmp")
            shutil.copytree(folder, part, ignore=shutil.ignore_patterns(f"{LOCK}*", ".*.tmp"))
            write_json(record(job.folder), _read(record(folder)) | {TAKEN: source})
            part.rename(job.folder)
            job.outcome.unlink(missing_ok=True)
        return source

    def _name(self, folder: Path) -> str:
        return taken_from(folder) or folder.relative_to(self.beside).as_posix()

    def _same(self, job: Job) -> Iterator[Path]:
        """Folders of other jobs' runs that must end as this one's."""
        wanted = _deciding(job.request["run"])
        run = RunSpec.read(self.registry, job.request["run"], job.label)
        made = makers(self.registry, run, self.device)
        for study in sorted(self.beside.glob(f"*/{STUDY}")):
            for file in sorted(study.parent.glob(f"*/seed{wanted['seed']}/{RUN}")):
                folder = file.parent
                if folder == job.folder.absolute() or _deciding(_read(file)) != wanted:
                    continue
                known = _read(record(folder))
                if {k: v for k, v in known.items() if k != TAKEN} == made:
                    yield folder


def _at_work(lock: Path) -> str | None:
    """Who holds a run's lock; nobody where its owner, on another machine, ended without a word."""
    held = holder(lock)
    if held is None:
        return None
    try:
        with locked(lock, str(lock)):
            return None
    except CheckpointError:  # held, or in a folder where nobody can tell
        return held


def _deciding(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in NAMES}


def _files(run: RunSpec) -> Iterator[tuple[str, list[int]]]:
    """Files that the run's options name (weights, lists of images) -> their size and time."""
    for text in _texts(run):
        path = Path(text)
        try:
            if path.is_file():
                yield str(path.absolute()), [path.stat().st_size, path.stat().st_mtime_ns]
        except (OSError, ValueError):  # not the name of a file
            continue


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _texts(getattr(value, field))
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


@functools.lru_cache
def _code(modules: frozenset[str]) -> str:
    """A checksum of the files of this project's packages and of the modules' own."""
    names = {m.name for m in pkgutil.iter_modules() if m.ispkg and m.name.startswith("mfuser")}
    names |= {module.partition(".")[0] for module in modules}
    found = hashlib.sha256()
    for name in sorted(names):
        for path in _sources(name):
            found.update(f"{name}/{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _sources(name: str) -> list[Path]:
    """The files of a package, or the one of a module."""
    module = sys.modules.get(name)
    spec = find_spec(name) if module is None else module.__spec__
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        return [Path(spec.origin)] if spec.origin else []
    return sorted(
        path
        for folder in spec.submodule_search_locations
        for path in Path(folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _clear(folder: Path) -> None:
    """Remove what processes that are no more have left of copying to a folder."""
    for part in folder.parent.glob(f".{folder.name}.*.tmp"):
        match = TEMPORARY.fullmatch(part.name)
        if match is not None and not lives(int(match[2])):
            shutil.rmtree(part, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    """A table out of a file; empty where it cannot be read."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
