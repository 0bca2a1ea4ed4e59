"""A study's runs on an engine of others: handed out, watched, and handed out again if lost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from rich.live import Live
from rich.table import Table

from mfuser.engine.console import Console
from mfuser.engine.folder import LOG
from mfuser.engine.lock import holder
from mfuser.engine.signals import handling
from mfuser.files import write_json
from mfuser.study.launchers import Handle, Launcher
from mfuser.study.reuse import Neighbors
from mfuser.study.runs import BUSY, Job, StudyInterrupted, Trouble, settled

RETRIES = 3
"""Times that a run is handed out again after its process, machine or node was lost."""
EVERY = 0.5
"""Seconds between looks."""
PATIENCE = 120.0
"""Seconds that runs have to save in after Ctrl-C."""


@dataclass
class _Run:
    job: Job
    head: str
    handle: Handle
    lost: int = 0
    last: str = ""

    def now(self) -> str:
        """A line on its work, place and progress."""
        held = holder(self.job.lock)
        if held is None:
            return "waiting"
        step = _step(self.job)
        return f"running on {held}" + (f", step {step}" if step else "")


def spread(
    jobs: Sequence[Job], launcher: Launcher, console: Console, neighbors: Neighbors | None = None
) -> list[Trouble]:
    """Hand every unfinished run to the engine at once and watch them; those that did not finish.

    A run that fails ends no other; what neighbors have finished is taken from them. Raises
    StudyInterrupted after Ctrl-C, once the runs have saved.
    """
    troubles: list[Trouble] = []
    runs: list[_Run] = []
    for number, job in enumerate(jobs, 1):
        head = f"[{number}/{len(jobs)}] {job.label}"
        if settled(job, head, console, troubles, neighbors):
            continue
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        handle = launcher.submit(job.order(), job.label)
        console.say(f"{head}: handed to {launcher.name} as {handle.name}")
        runs.append(_Run(job, head, handle))
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    with handling(stop), _Board(console) as board:
        while runs and not asked:
            runs = [run for run in runs if not _over(run, launcher, console, troubles)]
            board.show(runs)
            time.sleep(EVERY)
    if asked:
        _cancel(runs, console)
        raise StudyInterrupted(f"{len(runs)} runs were ended", asked[0])
    return troubles


def _over(run: _Run, launcher: Launcher, console: Console, troubles: list[Trouble]) -> bool:
    """Whether a run ended for good; one that was lost is handed out again."""
    ended = run.handle.ended()
    if ended is None:
        return False
    status, message = run.job.state()
    if status == "finished":
        console.say(f"{run.head}: finished")
        return True
    if ended == f"exit code {BUSY}":
        console.say(f"{run.head}: another process works on it")
        return True
    if status in ("open", "begun", "interrupted"):
        if run.lost < RETRIES:
            run.lost += 1
            run.handle = launcher.submit(run.job.order(), run.job.label)
            console.say(f"{run.head}: lost ({ended}); handed out again as {run.handle.name}")
            return False
        status, message = "failed", f"lost {run.lost + 1} times, the last time: {ended}"
        write_json(run.job.outcome, {"status": status, "message": message})
    console.say(f"{run.head}: {status}: {message}")
    troubles.append((run.job, status, message))
    return True


def _cancel(runs: Sequence[_Run], console: Console) -> None:
    console.say(f"ending {len(runs)} runs; each saves first")
    for run in runs:
        run.handle.cancel()
    until = time.monotonic() + PATIENCE
    # A process may outlive the engine's job by the seconds it needs to save.
    while time.monotonic() < until and any(
        run.handle.ended() is None or holder(run.job.lock) is not None for run in runs
    ):
        time.sleep(EVERY)


def _step(job: Job) -> int | None:
    """The last step that a run has logged."""
    try:
        with (job.folder / LOG).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            return int(json.loads(file.read().splitlines()[-1])["step"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


class _Board:
    """The runs and their places: a table that stays up to date on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        live = console.rich.is_terminal and not console.quiet
        self.live = Live(console=console.rich, transient=True) if live else None

    def __enter__(self) -> _Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, runs: Sequence[_Run]) -> None:
        if self.live:
            table = Table("run", "as", "now", box=None, pad_edge=False)
            for run in runs:
                table.add_row(run.head, run.handle.name, run.now())
            self.live.update(table)
            return
        for run in runs:
            now = run.now().partition(", step")[0]
            if now != run.last:
                if run.last or now != "waiting":
                    self.console.say(f"{run.head}: {now}")
                run.last = now
