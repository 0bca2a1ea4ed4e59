"""One training in a folder at a time: locks that name their owner and end with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from launching import launch

from mfuser import cli
from mfuser.engine.lock import InUse, locked
from mfuser.engine.train import Trainer


def test_two_starts_in_one_folder(write_registry: Any, tmp_path: Path) -> None:
    """Unconnected, at the same time: one is refused in one sentence, the other ends whole."""

    refused = tmp_path / "refused"

    def alone(rank: int) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        fail, fit = cli._fail, Trainer.fit

        def failing(message: str, arguments: list[str], code: int = 2) -> None:
            refused.touch()
            fail(message, arguments, code)

        def waiting(self: Trainer, *arguments: Any) -> None:
            until = time.monotonic() + 30
            while not refused.exists() and time.monotonic() < until:
                time.sleep(0.01)
            fit(self, *arguments)

        cli._fail, Trainer.fit = failing, waiting  # type: ignore[assignment, method-assign]

    command = ["train", "plain", "--recipe", "tiny", "--device", "cpu", "--out", tmp_path / "r"]
    command += ["--json", "--registry", write_registry()]
    for resume in ((), ("--resume",)):
        ended = launch([*command, *resume], tmp_path, prepare=alone)
        assert sorted(e.code or 0 for e in ended) == [0, 2], ended
        good, other = sorted(ended, key=lambda e: e.code or 0)
        assert json.loads(good.out)["protocol"]["steps"] == 4
        assert other.err.startswith("mfuser: ") and other.err.count("\n") == 1
        assert "is in use by process" in other.err or "already holds a run" in other.err
        refused.unlink()


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    """A lock held by a killed process and its children is free as soon as they are gone."""
    code = (
        "import sys, time, pathlib; from mfuser.engine.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'it'):\n"
        "    print('held', flush=True)\n"
        "    import os\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(2)\n"
        "        os._exit(0)\n"
        "    time.sleep(60)\n"
    )
    lock = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    message = rf"^it is in use by process {holder.pid} on \S+, since 20"
    with pytest.raises(InUse, match=message), locked(lock, "it"):
        pass
    holder.kill()
    holder.wait()
    with locked(lock, "it"):  # the child, like a data-loader worker, holds it two seconds longer
        failed: list[Exception] = []

        def other() -> None:
            try:
                with locked(lock, "it"):
                    pass
            except InUse as error:
                failed.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"in use by process {os.getpid()}" in str(failed[0])
    with locked(lock, "it"):
        pass
