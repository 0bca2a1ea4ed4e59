"""The threads that run a scan: torch's own where possible, otherwise a pool of this module.

Torch's OpenMP threads spin for milliseconds after each operator. A separate pool would get only
half of each processor beside them: MVFuser's scans took 12.3 ms, and 7.0 ms with spinning turned
off. So a scan runs on the spinning threads themselves, through GOMP_parallel of the library that
torch has loaded.

GNU OpenMP does not survive a fork: a child that enters a parallel region hangs or crashes. Forked
children, such as data-loader workers, therefore use the pool.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mfuser_kernels.scan.cpu.drive import Job

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0

Drive = Callable[[Any], None]


def _forked_before() -> bool:
    """Whether this process was forked and has not called exec since (Linux only).

    The fork may precede the import of this module, so that the hook below missed it.
    """
    try:
        with open("/proc/self/stat") as file:
            flags = int(file.read().rpartition(")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return False
    return bool(flags & 0x40)  # PF_FORKNOEXEC


_forked = _forked_before()


def run(drive: Drive, job: Job, count: int, threads: int, at_once: int) -> None:
    """Call `drive`, compiled code, on `threads` threads until tasks 0 to count - 1 are done.

    After every `at_once` tasks an interrupt (Ctrl-C) can end it.
    """
    parallel = None if _forked else _openmp()
    for first in range(0, count, at_once):
        job.next, job.stop, job.threads = first, min(first + at_once, count), 0
        if threads == 1:
            drive(ctypes.byref(job))
        elif parallel:
            # Always all threads: GNU OpenMP ends those that a smaller region leaves out.
            parallel(drive, ctypes.byref(job), threads, 0)
        else:
            _run_on_ours(drive, job, threads)


@cache
def _openmp() -> Callable[..., None] | None:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch has loaded."""
    home = Path(torch.__file__).parent
    for folder in (home / "lib", home.parent / "torch.libs"):
        for path in folder.glob("libgomp*.so*"):
            try:
                function = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
            except (OSError, AttributeError):
                continue  # not loaded, so not what torch uses
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            function.restype = None
            return function
    return None


def _run_on_ours(drive: Drive, job: Job, threads: int) -> None:
    helpers: list[Future[None]] = []
    try:
        for _ in range(min(threads, job.stop - job.next) - 1):
            helpers.append(_submit(threads - 1, drive, ctypes.byref(job)))
        drive(ctypes.byref(job))
    except BaseException:
        job.stop = 0
        raise
    finally:
        wait(helpers)  # they write to the caller's memory
    for helper in helpers:
        helper.result()


def _submit(threads: int, drive: Drive, job: Any) -> Future[None]:
    while True:
        try:
            return _executor(threads).submit(drive, job)
        except RuntimeError:  # meanwhile another thread has replaced the pool by a larger one
            if _pool is None:
                raise


def _executor(threads: int) -> ThreadPoolExecutor:
    global _pool, _size
    with _lock:
        if _pool is None or _size < threads:
            # The smaller pool finishes the work submitted to it; then its threads end.
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _size = ThreadPoolExecutor(threads, thread_name_prefix="mfuser-scan"), threads
        return _pool


def _after_fork() -> None:
    global _pool, _size, _lock, _forked
    _pool, _size, _lock, _forked = None, 0, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
