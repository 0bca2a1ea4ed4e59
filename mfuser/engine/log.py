"""The log of a training run: a JSON line per logged step, and the trackers that follow it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from mfuser.engine.console import Console
from mfuser.engine.folder import LOG
from mfuser.engine.validate import Seen
from mfuser.errors import CheckpointError, MFuserError, brief
from mfuser.files import write_text

EVERY = 10
"""Steps between lines."""


class Watcher(Protocol):
    """Is told what is logged, by the first process. What it raises ends its watch, not the run;
    an MFuserError of `begin` alone, which says what to change, ends the run before it starts."""

    name: str

    def begin(self, start: int, lines: Sequence[dict[str, Any]]) -> None:
        """Before the first step. start: steps that are done; lines: what was logged of them."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def validated(self, seen: Seen) -> None: ...

    def saved(self) -> None:
        """A checkpoint was written."""

    def close(self) -> None:
        """After the last step, or the one that the run was stopped at."""


def _until(file: Path, step: int) -> list[dict[str, Any]]:
    """The whole lines of steps up to `step`."""
    kept = []
    for line in file.read_text("utf-8", "replace").splitlines():
        try:
            entry = json.loads(line)
            if int(entry["step"]) <= step:
                kept.append(entry)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class Log:
    """`log.jsonl` in the run's folder, and its watchers.

    start: the step to go on from: what was logged of later ones, and a line that a killed process
    left half-written, are taken back. active: False writes nothing (processes other than the
    first).
    """

    def __init__(
        self,
        folder: Path,
        start: int = 0,
        *,
        active: bool = True,
        watchers: Sequence[Watcher] = (),
        console: Console | None = None,
    ) -> None:
        self.folder = folder
        self.start = start
        self.active = active
        self.watchers = list(watchers) if active else []
        self.console = console or Console()
        self._file: TextIO | None = None

    def __enter__(self) -> Log:
        lines: list[dict[str, Any]] = []
        if self.active:
            try:
                file = self.folder / LOG
                if file.is_file():
                    lines = _until(file, self.start)
                    write_text(file, "".join(f"{json.dumps(line)}\n" for line in lines))
                self._file = open(file, "a", encoding="utf-8")
            except OSError as error:
                raise CheckpointError(f"{self.folder} cannot be written: {error}") from error
        try:
            self._tell(lambda watcher: watcher.begin(self.start, lines), beginning=True)
        except MFuserError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._tell(lambda watcher: watcher.close())

    def write(self, step: int, values: dict[str, float]) -> None:
        self._line({"step": step, **values})
        self._tell(lambda watcher: watcher.log(step, values))

    def validated(self, seen: Seen) -> None:
        self._line({"step": seen.step, "validation": seen.as_dict()})
        self._tell(lambda watcher: watcher.validated(seen))

    def saved(self) -> None:
        self._tell(lambda watcher: watcher.saved())

    def _line(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def _tell(self, what: Callable[[Watcher], None], beginning: bool = False) -> None:
        """A tracker that fails is dropped: a full disk or a lost network must not be a reason to
        lose a training."""
        for watcher in list(self.watchers):
            try:
                what(watcher)
            except Exception as error:
                if beginning and isinstance(error, MFuserError):
                    raise
                self.watchers.remove(watcher)
                reason = brief(error) or type(error).__name__
                self.console.say(
                    f"{watcher.name} has failed and is left out from here on: {reason}"
                )
