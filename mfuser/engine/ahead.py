"""Threads beside the device: they read what comes next, and finish what it is done with.

Threads rather than processes: Pillow, OpenCV and NumPy let go of the interpreter while they work,
nothing is copied between processes, and none is forked from one that holds a GPU.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 4
"""Threads that nobody asked for: more than decode for one device."""
WAITING = 2
"""Pieces of work that wait for their turn, besides those at work."""


def workers_of(asked: int | None) -> int:
    """So many as were asked for; None: a core is left to the rest of each process here."""
    if asked is not None:
        return asked
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(0, min(MOST, _cores() // here - 1))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what a container or a scheduler leaves of them
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ahead(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    workers: int,
    waiting: int = WAITING,
) -> closing[Generator[Callable[[], Result], None, None]]:
    """`work` of each item in `workers` threads, in order: what is yielded returns a result, or
    raises what `work` did, when it is called.

        with ahead(paths, read, workers=1) as images:
            for image in images:
                show(image())

    workers: 0: when it is called, in this thread. waiting: results that may lie ready. Items are
    drawn in this thread. What is not begun when the block ends never is, what is begun is waited
    for.
    """
    return closing(_ahead(items, work, workers, waiting))


def _ahead(
    items: Iterable[Item], work: Callable[[Item], Result], workers: int, waiting: int
) -> Generator[Callable[[], Result], None, None]:
    if not workers:
        for item in items:
            yield partial(work, item)
        return
    pool = ThreadPoolExecutor(workers, "mfuser-ahead")
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) >= workers + waiting or begun[0].done():
                yield begun.popleft().result
        while begun:
            yield begun.popleft().result
    finally:
        pool.shutdown(cancel_futures=True)
