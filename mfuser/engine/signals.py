"""Ctrl-C and a scheduler's SIGTERM: handled while something runs, then as before."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""SIGTERM is how a scheduler announces that a job's time is up."""


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """`handler` for both signals; outside the main thread, which alone may set one, as before."""
    try:
        before = [signal.signal(number, handler) for number in SIGNALS]
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, previous in zip(SIGNALS, before, strict=True):
            signal.signal(number, previous)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether to stop: the first signal asks for it, the second ends at once."""
    asked: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    with handling(on_signal):
        yield lambda: bool(asked)
