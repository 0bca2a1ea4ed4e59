"""A limit on how long a stranger's code may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class TimeLimit(BaseException):
    """Not an Exception, so that a plugin's own `except Exception` does not swallow it."""


def limited(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns. Raises TimeLimit if it takes longer than `seconds`; 0: no limit.

    In the main thread an alarm interrupts the call, again every second for code that catches
    everything. Elsewhere, and where there are no alarms (Windows), the call runs in a thread of
    its own, which is left behind.
    """
    if seconds <= 0:
        return call()
    main = threading.current_thread() is threading.main_thread()
    if main and hasattr(signal, "setitimer"):
        return _with_alarm(seconds, call)
    return _in_thread(seconds, call)


def _with_alarm(seconds: float, call: Callable[[], T]) -> T:
    armed = True

    def ring(number: int, frame: FrameType | None) -> None:
        if armed:
            raise TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        return call()
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # someone else's alarm goes on, late by at most the limit
            signal.setitimer(signal.ITIMER_REAL, left, every)


def _in_thread(seconds: float, call: Callable[[], T]) -> T:
    result: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="mfuser plugin", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        _raise(failed[0])
    if not result:
        raise TimeLimit
    value: T = result[0]
    return value


def _raise(error: BaseException) -> NoReturn:
    raise error
