"""A training that something happens to in the middle of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mfuser.engine.train import Interrupted, Trainer


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[], None]) -> None:
    """Calls `what` during a step (counted from 1)."""
    original = Trainer._step

    def stepped(self: Trainer, number: int, batches: Any) -> Any:
        losses = original(self, number, batches)
        if number + 1 == step:
            what()
        return losses

    monkeypatch.setattr(Trainer, "_step", stepped)


@contextmanager
def gone_in(step: int) -> Iterator[None]:
    """Training within this block ends in this step, as if the process had been killed."""

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step, die)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def interrupted_in(step: int) -> Iterator[None]:
    """Ctrl-C in this step of the training within this block, which saves it and stops."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted) as stopped:
            yield
    assert stopped.value.step == step
