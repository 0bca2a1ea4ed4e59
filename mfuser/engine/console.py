"""Progress of a command: bars on a terminal, plain lines elsewhere.

Everything here goes to standard error; standard output is for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0
"""Seconds between progress lines where there is no terminal."""


class Task:
    """A piece of work of known length; `advance` as it goes."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done = total, done

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count


class _PlainTask(Task):
    def __init__(self, label: str, total: int, done: int) -> None:
        super().__init__(total, done)
        self.label, self.first, self.begun = label, done, time.monotonic()
        self.last = self.begun

    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        now = time.monotonic()
        if now - self.last < PLAIN_EVERY and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.first) / max(now - self.begun, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        print(
            f"{self.label} {self.done}/{self.total}  {note}  eta {_clock(left)}".replace(
                "    ", "  "
            ),
            file=sys.stderr,
            flush=True,
        )


class _BarTask(Task):
    def __init__(self, bar: Progress, label: str, total: int, done: int) -> None:
        super().__init__(total, done)
        self.bar = bar
        self.id = bar.add_task(label, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        self.bar.update(self.id, advance=count, note=note)


class Console:
    """quiet: say nothing (processes other than the first, `--json` in a pipe)."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.rich = RichConsole(stderr=True)

    def say(self, message: str) -> None:
        if not self.quiet:
            self.rich.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Task]:
        if self.quiet:
            yield Task(total, done)
        elif self.rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.rich) as bar:
                yield _BarTask(bar, label, total, done)
        else:
            yield _PlainTask(label, total, done)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
