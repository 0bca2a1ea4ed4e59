"""Threads of our own for the CPU kernels.

Not OpenMP: GNU OpenMP kills a forked child that enters a parallel region, and data-loader workers
are forked. A child gets a new pool.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def _executor(threads: int) -> ThreadPoolExecutor:
    global _pool, _size
    with _lock:
        if _pool is None or _size < threads:
            # The smaller pool is left to finish what others gave it; its threads then end.
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _size = ThreadPoolExecutor(threads, thread_name_prefix="mfuser-scan"), threads
        return _pool


def _after_fork() -> None:
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(count: int, threads: int, worker: Callable[[], Callable[[int], None]]) -> None:
    """Call task(0) to task(count - 1) on up to `threads` threads, this one included.

    `worker()` makes the task function of one thread, with buffers of its own. An interrupt stops
    the others after their current task and waits for them, since they write to the caller's memory.
    """
    numbers = itertools.count()
    stop = threading.Event()

    def work() -> None:
        task = worker()
        for i in numbers:  # next() of a count is atomic
            if i >= count or stop.is_set():
                return
            task(i)

    helpers: list[Future[None]] = []
    try:
        for _ in range(min(threads, count) - 1):
            helpers.append(_submit(threads - 1, work))
        work()
    except BaseException:
        stop.set()
        raise
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()


def _submit(threads: int, work: Callable[[], None]) -> Future[None]:
    while True:
        try:
            return _executor(threads).submit(work)
        except RuntimeError:  # another thread replaced the pool by a larger one in between
            if _pool is None:
                raise
