"""Locks that end with the process that holds them, however it ends, and say who that is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mfuser.errors import CheckpointError
from mfuser.files import lives, write_json

LEFT_BEHIND = 20.0
"""Seconds within which the data-loader workers of a killed process end, which hold its lock too."""
UNNAMED = 1.0
"""Seconds within which a process that has just taken the lock writes its name."""


class InUse(CheckpointError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; its owner is named beside it. what: for the message.

    Raises InUse naming the owner, CheckpointError where the folder takes no lock.
    """
    lock = FileLock(path)
    owner = path.with_name(f"{path.name}.owner")
    _acquire(lock, owner, what)
    try:
        with contextlib.suppress(OSError):  # for the message alone
            write_json(
                owner,
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                },
            )
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def holder(path: Path) -> str | None:
    """ "HOST, process 123" that holds the lock file `path`; None where that is unknown."""
    pid, host, _ = _read(path.with_name(f"{path.name}.owner"))
    if pid is None or (host == socket.gethostname() and not lives(pid)):
        return None
    return f"{host}, process {pid}"


def _acquire(lock: FileLock, owner: Path, what: str) -> None:
    begun = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout as error:
            pid, host, since = _read(owner)
            waited = time.monotonic() - begun
            if pid is None:  # it has not written its name yet
                waiting = waited < UNNAMED
            else:
                gone = host == socket.gethostname() and not lives(pid)
                waiting = gone and waited < LEFT_BEHIND
            if not waiting:
                named = f"process {pid} on {host}, since {since}" if pid else "another process"
                raise InUse(f"{what} is in use by {named}; wait for it or end it") from error
            time.sleep(0.1)
        except (OSError, NotImplementedError) as error:
            raise CheckpointError(f"{what} cannot be locked: {error}") from error


def _read(owner: Path) -> tuple[int | None, str, str]:
    try:
        value = json.loads(owner.read_text("utf-8"))
        return int(value["pid"]), str(value["host"]), str(value["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, "", ""
