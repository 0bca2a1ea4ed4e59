"""Several processes of one command without the seconds that each start of torch takes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forked import warm


@dataclass
class Ended:
    """How one process ended. code: below 0, the signal that killed it."""

    code: int | None
    out: str
    err: str


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(
    arguments: Sequence[object],
    folder: Path,
    *,
    count: int = 2,
    prepare: Callable[[int], None] | None = None,
    environment: dict[str, str] | None = None,
    within: float = 120.0,
) -> list[Ended]:
    """`mfuser ARGUMENTS` in `count` connected processes, as torchrun's variables connect them.

    folder: for what they print. prepare: called in each with its rank, first. within: seconds
    after which those that still run are killed (their code is -9).
    """
    fork = multiprocessing.get_context("fork")
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        **(environment or {}),
    }

    def work(rank: int) -> None:
        sys.settrace(None)  # coverage of the children is not kept
        os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        from mfuser.cli import main

        if prepare is not None:
            prepare(rank)
        try:
            main([str(a) for a in arguments])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    warm()
    running = [fork.Process(target=work, args=(rank,)) for rank in range(count)]
    for process in running:
        process.start()
    until = time.monotonic() + within
    for process in running:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [
        Ended(p.exitcode, (folder / f"out{r}").read_text(), (folder / f"err{r}").read_text())
        for r, p in enumerate(running)
    ]
