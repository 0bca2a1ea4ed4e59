"""Ctrl-C and what schedulers send before a job's time is up: handled while something runs, then as
before.

A training saves and ends; the exit code says whether the same command is to go on: REQUEUE after a
scheduler's signal, INTERRUPTED after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

SCHEDULERS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""How a scheduler announces that a job's time is up or that it makes room for another one: SIGTERM,
or what `--signal` of SLURM names; SIGUSR2 is submitit's choice."""
SIGNALS = (signal.SIGINT, *SCHEDULERS)

INTERRUPTED = 130
REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, try again."""

Handler = Callable[[int, "FrameType | None"], None]


class Ended(KeyboardInterrupt):
    """A scheduler's signal where no training was there to save. number: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(number: int) -> int:
    """Of a command that a signal ended. number: 0 where another process got it."""
    return REQUEUE if number in SCHEDULERS else INTERRUPTED


@contextlib.contextmanager
def handling(handler: Handler, numbers: Sequence[int] = SIGNALS) -> Iterator[None]:
    """`handler` for these signals, but for those that a launcher around us listens to itself.

    Outside the main thread, which alone may set one, everything is as before.
    """
    before: dict[int, object] = {}
    try:
        for number in numbers:
            if number == signal.SIGINT or _free(number):
                before[number] = signal.signal(number, handler)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)  # type: ignore[arg-type]


def _free(number: int) -> bool:
    """SIGTERM always: whoever listens to it gets it back. The user's signals where nobody does."""
    if number == signal.SIGTERM:
        return True
    now = signal.getsignal(number)
    ours = callable(now) and str(getattr(now, "__module__", "")).startswith("mfuser.")
    return ours or now == signal.SIG_DFL


class Asked:
    """Whether to stop. number: the scheduler's signal that asks for it, else Ctrl-C's; 0: none."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self) -> bool:
        return bool(self.numbers)

    @property
    def number(self) -> int:
        return max(self.numbers, key=lambda n: n in SCHEDULERS, default=0)


@contextlib.contextmanager
def interruptible() -> Iterator[Asked]:
    """Yields whether to stop: the first signal asks for it, a second Ctrl-C ends at once.

    A scheduler's signal may arrive twice, from it and from a launcher. One that came too late for
    anybody to ask is given to whoever listened before.
    """
    asked = Asked()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in asked.numbers:
            raise KeyboardInterrupt
        asked.numbers.append(number)

    with handling(on_signal):
        yield asked
    if asked():
        signal.raise_signal(asked.number)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """A scheduler's signal raises Ended, also before the first step and after the last."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    with handling(on_signal, SCHEDULERS):
        yield


def named(number: int) -> str:
    """ "SIGTERM"; "another process" for 0."""
    return signal.Signals(number).name if number else "another process"


def requeue() -> str:
    """Put this job back into SLURM's queue; returns a sentence on what came of it."""
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    if job is None:
        return "--requeue: this is not a SLURM job (SLURM_JOB_ID is not set); nothing was requeued"
    try:
        with handling(lambda *_: None, SCHEDULERS):  # the same signal once more would end it
            done = subprocess.run(
                ["scontrol", "requeue", job], capture_output=True, text=True, timeout=30
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"--requeue: job {job} could not be requeued: {error}"
    if done.returncode:
        return f"--requeue: job {job} could not be requeued: {' '.join(done.stderr.split())}"
    return f"job {job} is back in the queue"
