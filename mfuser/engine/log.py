"""What a training run writes down: a JSON line per logged step, and TensorBoard if asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mfuser.errors import CheckpointError, MissingExtraError
from mfuser.files import write_text

EVERY = 10
"""Steps between lines."""


def summary_writer() -> Any:
    """TensorBoard's writer. Raises MissingExtraError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "tensorboard", "tensorboard", "the recipe's option tensorboard"
        ) from error
    return SummaryWriter


def _until(file: Path, step: int) -> list[str]:
    """The whole lines of steps up to `step`."""
    kept = []
    for line in file.read_text("utf-8", "replace").splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class Log:
    """`log.jsonl` in the run's folder; with `tensorboard`, also its event files.

    start: the step to go on from: what was logged of later ones, and a line that a killed process
    left half-written, are taken back. active: False writes nothing (processes other than the
    first).
    """

    def __init__(
        self, folder: Path, start: int = 0, *, active: bool = True, tensorboard: bool = False
    ) -> None:
        self.folder = folder
        self.start = start
        self.active = active
        self._events: Any = None
        self._file: TextIO | None = None
        if active and tensorboard:
            # TensorBoard forgets the events of these steps that are in earlier files.
            again = start + 1 if (folder / "tensorboard").is_dir() else None
            self._events = summary_writer()(str(folder / "tensorboard"), purge_step=again)

    def __enter__(self) -> Log:
        if self.active:
            try:
                file = self.folder / "log.jsonl"
                if file.is_file():
                    write_text(file, "".join(_until(file, self.start)))
                self._file = open(file, "a", encoding="utf-8")
            except OSError as error:
                raise CheckpointError(f"{self.folder} cannot be written: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
