"""Checkpoints that a training saves on its way and at its end, and resuming from them.

A training waits for a copy of what is saved, in the memory of its machine; a thread writes it. The
next save waits until that is done, so that there is one copy at a time (two where a step's best
weights are saved as well), and so does the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor

from mfuser.config.pairing import PairingSpec
from mfuser.config.run import RunSpec
from mfuser.engine import checkpoints, shards
from mfuser.engine.averaging import Averages
from mfuser.engine.background import Background
from mfuser.engine.checkpoints import Checkpoint
from mfuser.engine.console import Console
from mfuser.engine.diagnose import Diverged
from mfuser.engine.processes import Processes
from mfuser.errors import CheckpointError, MFuserError, brief
from mfuser.model.dgss import DGSSModel

Tensors = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


AT_ONCE = 10.0
"""Seconds that a training which is to end at once (Ctrl-C, twice) waits for the file it writes."""


@dataclass(frozen=True)
class _Taken:
    """A snapshot of the run after a step, to be written."""

    state: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    averaged: dict[str, Tensor]
    meta: dict[str, Any]
    scaler: dict[str, Any] | None


class Saver:
    """A training's state and its files in the run's folder.

    Within `with`, files are written in the background; afterwards they are there.
    """

    def __init__(
        self,
        group: Processes,
        model: DGSSModel,
        optimizer: torch.optim.Optimizer,
        names: dict[Tensor, str],
        averages: Averages | None,
        run: RunSpec,
        folder: Path,
        console: Console,
    ) -> None:
        self.group, self.model, self.optimizer, self.names = group, model, optimizer, names
        self.averages, self.run, self.folder, self.console = averages, run, folder, console
        self.accelerator: Accelerator = group.accelerator
        self.frozen = checkpoints.frozen_fingerprint(model)
        self.background = Background()
        self._best = -1  # the step whose best weights were given to the background last

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
            return
        try:  # not together with the others, which may be gone
            self.background.wait(None if isinstance(error, Exception) else AT_ONCE)
        except Exception as lost:  # the reason to end is another one
            self.console.say(brief(lost))

    def resume(self) -> int:
        """Continue from the last whole checkpoint; returns its step (0 if there is none)."""
        found: list[tuple[Path, Checkpoint | None, str]] = []

        def look() -> str:
            found.append(checkpoints.read_last(self.folder))
            return found[0][2]

        def restore() -> int:
            path, checkpoint, _ = found[0] if found else checkpoints.read_last(self.folder)
            return self._restore(path, checkpoint) if checkpoint is not None else 0

        damage = self.group.from_main(look)  # sets aside what is damaged, before others look
        step = self.group.together(restore)
        if damage:
            self.console.say(damage)
        self.console.say(f"resuming {self.folder} at step {step}")
        return step

    def _restore(self, path: Path, checkpoint: Checkpoint) -> int:
        if not self._is_of(checkpoint.meta["pairing"]):
            raise CheckpointError(f"{path} is of another pairing than the run in {self.folder}")
        checkpoints.restore(self.model, checkpoint, path)
        scale = checkpoint.meta.get("scaler")  # float16 may have skipped every step so far
        if checkpoint.step and not checkpoint.optimizer and scale is None:
            raise CheckpointError(f"{path} holds no state of the optimizer to resume from")
        from_optimizer_state(self.optimizer, self.names, checkpoint.optimizer)
        if self.averages is not None:
            self.averages.restore(checkpoint.averaged, path)
        if self.accelerator.scaler is not None and scale is not None:
            self.accelerator.scaler.load_state_dict(scale)
        return checkpoint.step

    def _is_of(self, saved: dict[str, Any]) -> bool:
        """Whether a checkpoint's pairing is this run's, also where it was written before there were
        some of today's options, which it then has at their defaults."""
        if saved == self.run.pairing.model_dump(mode="json"):
            return True
        try:
            return PairingSpec.model_validate(saved) == self.run.pairing
        except (ValidationError, MFuserError):
            return False

    def save(self, step: int) -> None:
        """Save in the first process, in the background. The others wait for its copy; all fail if
        an earlier save could not be written."""
        tensors = self._tensors() if self.group.sharded else None
        self.group.from_main(lambda: self._begin(step, tensors))

    def save_best(self, step: int, tensors: dict[str, Tensor], weights: dict[str, Any]) -> None:
        """Save the weights of a step, in the first process. weights: their record in
        `Checkpoint.meta`."""
        self.background.wait()
        best = Checkpoint(copied(tensors), {}, self.meta(step) | {"weights": weights})
        self.background.put(partial(checkpoints.write, self.folder / checkpoints.BEST, best))
        self._best = step

    def save_now(self, step: int) -> bool:
        """Save in this process alone, without a copy, when memory has run out; whether it could."""
        if self.group.sharded:
            return False  # the others would have to take part
        try:
            self.background.wait()
            self._write(self._take(step))
        except (MFuserError, MemoryError, RuntimeError) as error:
            self.console.say(f"step {step} could not be saved: {brief(error)}")
            return False
        return True

    @property
    def failed(self) -> bool:
        """Whether this process could not write, which the next save raises."""
        return self.background.failed

    def wait(self) -> None:
        """Wait in all processes until everything saved is on the disk. Raises what went wrong."""
        self.group.from_main(self.background.wait)

    def complete(self) -> None:
        """Write the finished model where a file of it is missing or damaged."""
        if not self.group.from_main(self._whole):
            self.save(self.run.recipe.steps)

    def _whole(self) -> bool:
        names = [checkpoints.FINAL, *([checkpoints.AVERAGED] if self.averages else [])]
        try:
            if all((self.folder / name).is_file() for name in names):
                for name in names:
                    checkpoints.read(self.folder / name)
                return True
        except CheckpointError as error:
            self.console.say(f"{error}; it is written again")
        return False

    def kept(self) -> str:
        """The part of an error that says from where the run can go on."""
        with contextlib.suppress(Exception):
            self.background.wait()  # it may be on its way
        if not (self.folder / checkpoints.LAST).is_file():
            return ""
        return f" (the last checkpoint in {self.folder} is from before)"

    def meta(self, step: int) -> dict[str, Any]:
        return {
            "pairing": self.run.pairing.model_dump(mode="json"),
            "run": self.run.model_dump(mode="json"),
            "step": step,
            "frozen": self.frozen,
        }

    def _begin(self, step: int, gathered: Tensors | None) -> None:
        """gathered: of a model in shards."""
        if self._best != step:
            self.background.wait()
        taken = self._take(step, gathered)
        if gathered is None:
            state, optimizer, averaged = map(copied, (taken.state, taken.optimizer, taken.averaged))
            taken = _Taken(state, optimizer, averaged, taken.meta, taken.scaler)
        self.background.put(partial(self._write, taken))

    def _tensors(self) -> Tensors:
        """The trained weights, the optimizer's state and the averages, not copied; of a model in
        shards, gathered by all processes for the first."""
        found = (
            checkpoints.trained_state(self.model),
            to_optimizer_state(self.optimizer, self.names),
            self.averages.values if self.averages is not None else {},
        )
        if not self.group.sharded:
            return found
        state, optimizer, averaged = (
            shards.gathered(self.model, one, self.group.main) for one in found
        )
        return state, optimizer, averaged

    def _take(self, step: int, gathered: Tensors | None = None) -> _Taken:
        """The state after a step, not copied. Raises Diverged where it is not finite."""
        state, optimizer, averaged = gathered or self._tensors()
        broken = [n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
        if broken:  # a finite loss may have an infinite gradient
            raise Diverged(
                f"{broken[0]} is no longer finite after step {step}; lower lr = "
                f"{self.run.recipe.lr:g} or set clip_grad{self.kept()}"
            )
        scaler = self.accelerator.scaler  # None but in float16
        return _Taken(
            state,
            optimizer,
            averaged,
            self.meta(step),
            None if scaler is None else dict(scaler.state_dict()),
        )

    def _write(self, taken: _Taken) -> None:
        meta = taken.meta
        last = meta if taken.scaler is None else meta | {"scaler": taken.scaler}
        checkpoints.write_last(
            self.folder, Checkpoint(taken.state, taken.optimizer, last, taken.averaged)
        )
        if meta["step"] == self.run.recipe.steps:
            if taken.averaged:  # first: without them, the last weights would pass for the result
                other = Checkpoint(taken.averaged, {}, meta | {"weights": {"kind": "averaged"}})
                checkpoints.write(self.folder / checkpoints.AVERAGED, other)
            checkpoints.write(self.folder / checkpoints.FINAL, Checkpoint(taken.state, {}, meta))


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the memory of the machine; what happens to them afterwards does not reach the copies."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def to_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str]
) -> dict[str, Tensor]:
    """The optimizer's tensors, by parameter name."""
    return {
        f"{key}.{names[p]}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def from_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], saved: dict[str, Tensor]
) -> None:
    by_name = {name: p for p, name in names.items()}
    fused = bool(optimizer.defaults.get("fused"))
    for key, value in saved.items():
        slot, _, name = key.partition(".")
        if name not in by_name:
            raise CheckpointError(
                f"the checkpoint's optimizer knows a tensor {name} that the model lacks"
            )
        parameter = by_name[name]
        # AdamW keeps its step count on the CPU, unless it is fused. A copy: what was read is the
        # file itself, mapped.
        on_cpu = slot == "step" and not fused
        target = value.clone() if on_cpu else shards.placed(value, parameter)
        optimizer.state[parameter][slot] = target
