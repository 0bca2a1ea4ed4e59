"""State of the process that a plugin's code changes by accident, put back and named.

An import or a `build` that sets the default dtype, seeds a generator or silences all warnings
changes what every other part computes or reports. Its prints go to standard error: standard output
belongs to the command.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class _Setting:
    """get: the value, comparable by ==. put: sets it. shown: whether people can read it."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], None]
    shown: bool = True


@contextlib.contextmanager
def contained(draws: bool = False) -> Iterator[list[str]]:
    """Undo what the block changes in the process; the list it yields then names each change.

    draws: the block may draw from torch's generator, as a `build` does for its weights, but not
        seed it.
    """
    before = [setting.get() for setting in SETTINGS]
    generators = _Generators()
    marked = draws and generators.mark()
    changes: list[str] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield changes
    finally:
        for setting, value in zip(SETTINGS, before, strict=True):
            now = setting.get()
            if now != value:
                setting.put(value)
                values = f" from {value} to {now}" if setting.shown else ""
                changes.append(f"{setting.name}{values}")
        if draws and generators.seeded(marked):
            generators.restore()
            changes.append("the seed of torch's random generator")
        elif marked:
            generators.unmark()
        elif not draws and generators.moved():
            generators.restore()
            changes.append("torch's random generator")


class _Generators:
    """torch's generators as they are when this is made.

    Seeding once more with the same number, the likeliest of all, leaves no trace in the public
    state. So while a block may draw, the first eight bytes of the CPU generator's state, which hold
    its seed and no part of the stream, hold a mark instead.
    """

    MARK = 0x5EED0FA5ACE11

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.seed = torch.initial_seed()

    def mark(self) -> bool:
        """Whether the mark took, which another layout of the state would not."""
        self._put_seed(self.cpu, self.MARK)
        if torch.initial_seed() == self.MARK:
            return True
        self.restore()
        return False

    def unmark(self) -> None:
        self._put_seed(torch.get_rng_state(), self.seed)

    def seeded(self, marked: bool) -> bool:
        return torch.initial_seed() != (self.MARK if marked else self.seed)

    def moved(self) -> bool:
        return not torch.equal(torch.get_rng_state(), self.cpu)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    @staticmethod
    def _put_seed(state: torch.Tensor, seed: int) -> None:
        state = state.clone()
        state.numpy()[:8] = np.frombuffer((seed % 2**64).to_bytes(8, "little"), np.uint8)
        torch.set_rng_state(state)


def _broad(entry: Any) -> bool:
    """A filter of Python's own categories, whatever the message and the module.

    Libraries add narrow ones for warnings of theirs when they are imported; those stay.
    """
    _, message, category, module, line = entry
    everywhere = message is None and module is None and not line
    return everywhere and category.__module__ == "builtins"


def _filters() -> list[Any]:
    return [entry for entry in warnings.filters if _broad(entry)]


def _restore_filters(before: list[Any]) -> None:
    narrow = [entry for entry in warnings.filters if not _broad(entry)]
    warnings.resetwarnings()  # also tells the interpreter that the list has changed
    warnings.filters[:] = [*narrow, *before]  # type: ignore[index]


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _restore_deterministic(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _restore_device(before: torch.device) -> None:
    # Stated, even the CPU costs a look at every call.
    torch.set_default_device(None if before.type == "cpu" else before)


def _restore_grad_mode(before: bool) -> None:
    torch.set_grad_enabled(before)


def _restore_anomaly_detection(before: bool) -> None:
    torch.autograd.set_detect_anomaly(before)


def _restore_numpy(before: bytes) -> None:
    np.random.set_state(pickle.loads(before))


SETTINGS = (
    _Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("the default device", torch.get_default_device, _restore_device),
    _Setting("the grad mode", torch.is_grad_enabled, _restore_grad_mode),
    _Setting("the number of threads", torch.get_num_threads, torch.set_num_threads),
    _Setting("deterministic algorithms", _deterministic, _restore_deterministic, shown=False),
    _Setting("anomaly detection", torch.is_anomaly_enabled, _restore_anomaly_detection),
    _Setting(
        "the precision of float32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    *(
        _Setting(
            f"torch.backends.cudnn.{name}",
            partial(getattr, torch.backends.cudnn, name),
            partial(setattr, torch.backends.cudnn, name),
        )
        for name in ("enabled", "deterministic", "benchmark")
    ),
    _Setting("the warnings filters", _filters, _restore_filters, shown=False),
    _Setting("Python's random generator", random.getstate, random.setstate, shown=False),
    _Setting(
        "NumPy's random generator",
        lambda: pickle.dumps(np.random.get_state(legacy=False)),
        _restore_numpy,
        shown=False,
    ),
)
