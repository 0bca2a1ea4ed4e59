"""The losses of steps that nobody has looked at yet.

To read a number the host waits until the device has computed it, and then the device waits for the
host to send the next work. So on a GPU the losses stay where they are and are fetched together when
they are wanted: for the log, and before anything is saved or measured. Whether a loss is finite is
decided there, too, for the optimizer must not move the weights by one that is not: once there was
one, no later step moves them either, and what is fetched says which one was the first.

On a CPU there is nothing to wait for; each step's losses are fetched at once.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfuser.data.loading import Batch
from mfuser.engine.processes import Processes

STOP = "stop"
"""Beside the losses that the processes share: whether one of them is to stop."""


@dataclass
class Step:
    """A step's losses. number: from 0. batches: what it saw. own: losses of this process.
    shared: their means over the processes; {} until they are fetched."""

    number: int
    batches: list[Batch]
    own: dict[str, float] = field(default_factory=dict)
    shared: dict[str, float] = field(default_factory=dict)
    on_device: list[tuple[list[str], Tensor]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return sum(self.shared.values())


def deferrable(group: Processes) -> bool:
    """Whether losses stay on the device: on CUDA, where the fused optimizer leaves out a step by
    what the device has found. In float16 its scale is looked at in every step anyway, and shared
    weights have no such optimizer."""
    accelerator = group.accelerator
    on_gpu = accelerator.device.type == "cuda"
    return on_gpu and accelerator.scaler is None and not group.sharded


class Losses:
    """Those since they were last fetched.

    accumulate: batches per step. deferred: see `deferrable`; the optimizer is then a fused one.
    """

    def __init__(
        self,
        group: Processes,
        optimizer: torch.optim.Optimizer,
        accumulate: int,
        deferred: bool,
    ) -> None:
        self.group, self.optimizer = group, optimizer
        self.accumulate, self.deferred = accumulate, deferred
        self._steps: list[Step] = []
        self._since = 0.0
        self._broken: Any = torch.zeros((), device=group.accelerator.device) if deferred else None

    def begin(self, number: int, batches: list[Batch]) -> None:
        """A step (from 0) and its batches."""
        self._steps.append(Step(number, batches))

    def clock(self) -> None:
        """The time of the steps that are fetched next counts from here, if none is under way."""
        if not self._steps:
            self._since = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Those of one of the step's batches."""
        step = self._steps[-1]
        if not self.deferred:
            for name, value in losses.items():
                step.own[name] = step.own.get(name, 0.0) + value.item() / self.accumulate
            return
        values = torch.stack([value.detach().float() for value in losses.values()])
        step.on_device.append((list(losses), values))
        torch.maximum(self._broken, (~values.isfinite()).any().float(), out=self._broken)

    def passed(self) -> bool:
        """Whether the optimizer is to be called; on the device it then decides for itself."""
        if not self.deferred:
            return all(math.isfinite(value) for value in self._steps[-1].own.values())
        if self.group.count > 1:
            dist.all_reduce(self._broken, dist.ReduceOp.MAX)
        self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]
        return True

    def forget(self) -> None:
        """The current step, which was not completed."""
        self._steps.pop()

    @property
    def own(self) -> dict[str, float]:
        """Of the step at hand in this process; {} as long as they are on the device."""
        return self._steps[-1].own

    @property
    def waiting(self) -> bool:
        """Whether there are losses to fetch."""
        return bool(self._steps)

    def due(self, wanted: bool, asked: bool) -> bool:
        """Whether to fetch now. wanted: in all processes. asked: this one is to stop, which others
        learn when they fetch."""
        return not self.deferred or wanted or (asked and self.group.count == 1)

    def fetch(self, asked: bool) -> tuple[list[Step], bool, float]:
        """The steps since the last call (there is one), whether one of the processes is to stop,
        and the seconds of a step."""
        steps, self._steps = self._steps, []
        if self.deferred:
            values = iter(torch.cat([v for s in steps for _, v in s.on_device]).tolist())
            for step in steps:
                for names, _ in step.on_device:
                    for name in names:
                        value = next(values) / self.accumulate
                        step.own[name] = step.own.get(name, 0.0) + value
        own = {f"{i} {name}": v for i, s in enumerate(steps) for name, v in s.own.items()}
        shared = self.group.mean({STOP: float(asked), **own})
        stop = shared.pop(STOP) > 0
        for key, value in shared.items():
            i, _, name = key.partition(" ")
            steps[int(i)].shared[name] = value
        seconds = (time.perf_counter() - self._since) / len(steps)
        return steps, stop, seconds
