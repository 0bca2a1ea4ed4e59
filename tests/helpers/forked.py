"""`python -m mfuser …` in a process of its own, without the seconds that importing torch takes."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import cv2


class Forked:
    """As much of subprocess.Popen as the tests need, forked from this process.

    What has been imported here is there at once. For tests of processes (exit codes, signals,
    pipes); not for those of imports, or of what has been installed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        text: bool = True,
        start_new_session: bool = False,
    ) -> None:
        assert list(command[:2]) == [sys.executable, "-m"] and text
        self.returncode: int | None = None
        pipes = {n: os.pipe() for n, end in enumerate((stdin, stdout, stderr)) if end == -1}
        ends = {n: pipe[n > 0] for n, pipe in pipes.items()}
        given = {n: fd for n, fd in ((1, stdout), (2, stderr)) if fd is not None and fd >= 0}
        warm()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            sys.settrace(None)  # coverage of the child is not kept
            for n, pipe in pipes.items():
                os.close(pipe[n == 0])
            os._exit(_run(command, cwd, env, {**given, **ends}, start_new_session))
        for end in ends.values():
            os.close(end)
        mine = {n: os.fdopen(pipe[n == 0], "rw"[n == 0]) for n, pipe in pipes.items()}
        self.stdin: IO[str] | None = mine.get(0)
        self.stdout: IO[str] | None = mine.get(1)
        self.stderr: IO[str] | None = mine.get(2)

    def poll(self) -> int | None:
        if self.returncode is None:
            self._ended(os.waitpid(self.pid, os.WNOHANG))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired("forked", timeout or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, input: str = "", timeout: float | None = None) -> tuple[str, str]:
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(input)
                self.stdin.close()
        # One after the other: what is written fits into a pipe.
        found = [end.read() if end is not None else "" for end in (self.stdout, self.stderr)]
        self.wait(timeout)
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, found: tuple[int, int]) -> None:
        if found[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])


def warm() -> None:
    """Imports, before a fork, the libraries that each child would import for seconds."""
    import accelerate  # noqa: F401
    import open_clip  # noqa: F401
    import timm  # noqa: F401

    import mfuser.engine.run  # noqa: F401

    cv2.setNumThreads(1)  # its threads do not outlive a fork, and it waits for them


def training(registry: Path, cwd: Path, steps: int) -> Forked:
    """A training of `plain` with a loader worker, in a session of its own; its log has begun."""
    command = [sys.executable, "-m", "mfuser", "train", "plain", "--recipe", "tiny"]
    command += ["--registry", str(registry), "--out", "run", "--no-evaluate"]
    command += ["--set-recipe", f"steps={steps}", "--set-recipe", "workers=1"]
    process = Forked(command, cwd=cwd, stderr=subprocess.PIPE, start_new_session=True)
    log = cwd / "run" / "log.jsonl"
    for _ in range(600):
        if process.poll() is not None or (log.is_file() and log.read_text()):
            break
        time.sleep(0.1)
    return process


def forked(command: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    """`mfuser COMMAND` in the folder `cwd`, as subprocess.run gives it."""
    words = [sys.executable, "-m", "mfuser", *map(str, command)]
    process = Forked(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode or 0, out, err)


def _run(
    command: Sequence[str],
    cwd: Path | None,
    env: Mapping[str, str] | None,
    ends: Mapping[int, int],
    start_new_session: bool,
) -> int:
    """In the child: the module as `__main__`, and its exit code."""
    code: object = 0
    try:
        if start_new_session:
            os.setsid()
        for number, end in ends.items():
            os.dup2(end, number)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(n, "rww"[n], closefd=False) for n in range(3)
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        if cwd is not None:
            os.chdir(cwd)
        sys.argv = list(command[2:])
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
