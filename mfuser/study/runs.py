"""Working through a study, one process per run: what is finished, what is left.

OUT/study.json                the contents of the folder, resolved
    VARIANT/seed0/            a run folder
    VARIANT/seed0.json        how it ended, if it did not finish
    VARIANT/seed0.made.json   what made it, and from where it was taken if it was (reuse.py)
    results.{json,md,csv,png}
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mfuser.config.registry import Registry
from mfuser.engine.checkpoints import FINAL, LAST
from mfuser.engine.console import Console
from mfuser.engine.folder import RUN, read_run
from mfuser.engine.lock import InUse, locked
from mfuser.engine.signals import handling
from mfuser.errors import CheckpointError, MFuserError
from mfuser.files import write_json
from mfuser.study.grid import Variant

if TYPE_CHECKING:
    from mfuser.study.reuse import Neighbors

STUDY = "study.json"
REPORT = "report.json"
BUSY = 75
"""A worker's exit code where another process works on its job (EX_TEMPFAIL)."""
LOOK = 2.0
"""Seconds between looks at runs that are waited for."""


class StudyInterrupted(Exception):
    """Ctrl-C or a scheduler's signal (its number): the current run has saved."""

    def __init__(self, message: str, signal: int = 0) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class Job:
    """One process's work. done: the files that are there once it is finished, its record last.
    read: raises for the text of a record that is damaged."""

    label: str
    folder: Path
    done: tuple[Path, ...]
    request: dict[str, Any] = field(repr=False)
    read: Callable[[str], object] = field(default=json.loads, repr=False)

    @property
    def outcome(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def lock(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.lock")

    def order(self) -> dict[str, Any]:
        """The order for a worker: the request, and the files of its answer, wherever it runs."""
        return {
            **self.request,
            "label": self.label,
            "folder": str(self.folder.absolute()),
            "outcome": str(self.outcome.absolute()),
            "lock": str(self.lock.absolute()),
            "cwd": str(Path.cwd()),
        }

    def finished(self) -> bool:
        """Whether all its files are there, and its record is whole."""
        try:
            if all(path.is_file() for path in self.done):
                self.read(self.done[-1].read_text("utf-8"))
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return False

    def state(self) -> tuple[str, str]:
        """finished, diverged, failed, interrupted, begun or open; and a word of explanation."""
        if self.finished():
            return "finished", ""
        try:
            ended = json.loads(self.outcome.read_text("utf-8"))
            return str(ended["status"]), str(ended["message"])
        except (OSError, ValueError, KeyError, TypeError):
            return ("begun" if (self.folder / LAST).is_file() else "open"), ""


@dataclass(frozen=True)
class Inputs:
    """Arguments of the command that every run needs as well."""

    registries: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    data_roots: tuple[str, ...] = ()
    device: str | None = None

    def request(self, work: str, **more: Any) -> dict[str, Any]:
        return {
            "work": work,
            "registries": list(self.registries),
            "plugins": list(self.plugins),
            "data_roots": list(self.data_roots),
            "device": self.device,
            **more,
        }


def training_jobs(variants: Sequence[Variant], out: Path, inputs: Inputs) -> list[Job]:
    """Every run, seed by seed: the table is complete once every variant has run once."""
    seeds = list(variants[0].runs)
    jobs = []
    for seed in seeds:
        for variant in variants:
            folder = out / variant.slug / f"seed{seed}"
            request = inputs.request("train", run=variant.runs[seed].model_dump(mode="json"))
            jobs.append(training_job(f"{variant.label}, seed {seed}", folder, request))
    return jobs


def training_job(label: str, folder: Path, request: dict[str, Any] | None = None) -> Job:
    """The job of one run. request: of `Inputs`; None for a run that is only looked at."""
    done = (folder / FINAL, folder / REPORT)
    return Job(label, folder, done, request or {}, _read_report)


def open_study(out: Path, name: str, identities: dict[str, dict[str, Any]]) -> None:
    """Make or reopen a results folder. identities: of each variant, by the name of its folder.

    Variants and seeds may be added to a folder. Raises CheckpointError, and touches nothing, if
    it holds another study or a variant that was something else.
    """
    check_study(out, name, identities)
    known = _read(out / STUDY).get("variants", {}) if (out / STUDY).is_file() else {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / STUDY, {"study": name, "variants": {**known, **identities}})
    except OSError as error:
        raise CheckpointError(f"the folder {out} cannot be written: {error.strerror}") from error


def check_study(out: Path, name: str, identities: dict[str, dict[str, Any]]) -> None:
    file = out / STUDY
    if not file.is_file():
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out} is a file; choose another --out")
        if out.is_dir() and any(out.iterdir()):
            raise CheckpointError(
                f"{out} is not empty and holds no study (there is no {STUDY}); choose another --out"
            )
        return
    begun = _read(file)
    if begun.get("study") != name:
        raise CheckpointError(
            f"{out} holds another study, '{begun.get('study')}', not '{name}'; choose another --out"
        )
    for slug, identity in identities.items():
        before = begun.get("variants", {}).get(slug)
        if before is not None and before != identity:
            key, old, new = _difference(before, identity)
            raise CheckpointError(
                f"{out} holds study '{name}' with other settings: {key} is {old!r}, not {new!r} "
                f"(variant {slug}); use the same settings or choose another --out"
            )


def check_runs(registry: Registry, variants: Sequence[Variant], out: Path) -> None:
    """Raises CheckpointError where a folder holds a different run from the study's."""
    for variant in variants:
        for seed, run in variant.runs.items():
            folder = out / variant.slug / f"seed{seed}"
            if not (folder / RUN).is_file():
                continue
            begun = read_run(registry, folder)
            for key in ("pairing", "recipe", "sources", "targets", "seed"):
                if getattr(begun, key) != getattr(run, key):
                    raise CheckpointError(
                        f"{folder} holds a different run from the study's (its {key} differs); "
                        "remove it or choose another --out"
                    )


def share(jobs: Sequence[Job], index: int, of: int) -> list[Job]:
    """Every `of`-th run, from `index` (from 0): what one process or machine works through."""
    if not 0 <= index < of:
        raise MFuserError(f"--index {index} --of {of}: the index must be from 0 to {of - 1}")
    return list(jobs[index::of])


Trouble = tuple[Job, str, str]
"""A run that did not finish, its state, and why."""


def work_through(
    jobs: Sequence[Job], console: Console, neighbors: Neighbors | None = None
) -> list[Trouble]:
    """Run the unfinished ones in turn; returns those that failed, with the reason.

    A diverged run would diverge again and is skipped; failed and interrupted ones are run again.
    What neighbors have finished is taken from them; what they are training is waited for, after
    everything else. Raises StudyInterrupted after Ctrl-C, once the current run has saved.
    """
    troubles: list[Trouble] = []
    left = [(job, f"[{number}/{len(jobs)}] {job.label}") for number, job in enumerate(jobs, 1)]
    told: set[str] = set()
    while left:
        later = [
            (job, head)
            for job, head in left
            if not _done(job, head, console, troubles, neighbors, told)
        ]
        if len(later) == len(left):
            try:
                time.sleep(LOOK)
            except KeyboardInterrupt as stop:
                number = getattr(stop, "number", 0)
                raise StudyInterrupted(f"{later[0][0].label}: waited for", number) from stop
        left = later
    return troubles


def _done(
    job: Job,
    head: str,
    console: Console,
    troubles: list[Trouble],
    neighbors: Neighbors | None,
    told: set[str],
) -> bool:
    """Whether a job has had its turn; False where it must wait for a neighbor's run."""
    if settled(job, head, console, troubles, neighbors):
        return True
    if neighbors is not None and (other := neighbors.at_work(job)):
        if head not in told:
            console.say(f"{head}: the same run is being trained ({other})")
            told.add(head)
        return False
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(job.lock, job.label):
            pass
        console.say(head)
        code, stopped = _run(job)
        if code == BUSY:
            raise InUse(f"{job.label} is in use by another process")
    except InUse as error:
        console.say(f"{head.partition(' ')[0]} {error}")
        return True
    status, message = job.state()
    if stopped:
        raise StudyInterrupted(f"{job.label}: {status} {message}".rstrip(), stopped)
    if status == "finished":
        return True
    if status in ("open", "begun"):
        status, message = "failed", _ended(code)
        write_json(job.outcome, {"status": status, "message": message})
    console.say(f"{head}: {status}: {message}")
    troubles.append((job, status, message))
    return True


def settled(
    job: Job,
    head: str,
    console: Console,
    troubles: list[Trouble],
    neighbors: Neighbors | None = None,
) -> bool:
    """Whether there is nothing left to run of a job, which is then said."""
    status, message = job.state()
    if status == "finished":
        console.say(f"{head}: already finished")
    elif neighbors is not None and (source := _taken(job, neighbors)):
        console.say(f"{head}: the same run as {source}, taken from there")
        return True
    elif status == "diverged":
        console.say(f"{head}: diverged earlier (remove {job.outcome} to try again)")
        troubles.append((job, status, message))
    return status in ("finished", "diverged")


def _taken(job: Job, neighbors: Neighbors) -> str | None:
    try:
        return neighbors.take(job)
    except InUse:  # by a process that takes it as well; whoever would run it says so
        return None


def _run(job: Job) -> tuple[int, int]:
    """The job in its own process -> its exit code, and the signal that was passed on, or 0."""
    return in_process(job.order(), sys.stderr.fileno() if _has_descriptor(sys.stderr) else None)


def in_process(
    order: dict[str, Any], stdout: int | None = None, started: Callable[[Any], None] | None = None
) -> tuple[int, int]:
    """A job's order carried out by a process of its own -> its exit code, and the signal (Ctrl-C's
    or a scheduler's) that was passed on to it, or 0.

    That process holds the job's lock, which lasts as long as it, even if this one is killed.
    started: is given the process.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "mfuser.study.worker"],
        stdin=subprocess.PIPE,
        stdout=stdout,
        text=True,
        # Its own group: a terminal's Ctrl-C reaches it once, through us.
        start_new_session=True,
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if process.poll() is None:
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)

    asked: list[int] = []
    if started is not None:
        started(process)
    with handling(pass_on):
        process.communicate(json.dumps(order))
    return process.returncode, asked[0] if asked else 0


def _read_report(text: str) -> None:
    """Raises where a part is missing that the study's table is made of."""
    report = json.loads(text)
    for key in ("protocol", "notes", "average"):
        report[key]
    for domain in report["domains"].values():
        for key in ("miou", "seen", "images"):
            domain[key]


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _ended(code: int) -> str:
    if code == -signal.SIGKILL if hasattr(signal, "SIGKILL") else False:
        return "the system killed it, most likely because memory ran out"
    if code < 0:
        return f"it ended by signal {-code}"
    return f"it ended with exit code {code} and no report"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not describe a study")
    return value


def _difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any]:
    """The first key at which two tables differ, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return path, old, new
