"""Averages of the trained weights over the steps of a training (EMA), beside the weights.

The decay follows from the step's number alone, so that the averages of a resumed run are those of
one that never stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mfuser.config.recipe import AverageSpec
from mfuser.engine import checkpoints
from mfuser.engine.processes import Processes
from mfuser.engine.shards import placed
from mfuser.errors import CheckpointError
from mfuser.model.dgss import DGSSModel


class Averages:
    """values: the averages, by the names of `checkpoints.trained_state`.

    What is trained and the running statistics of its norms are averaged; whole numbers (counts of
    batches) are those of the last step. Every process holds the same, but for running statistics.
    """

    def __init__(self, model: DGSSModel, spec: AverageSpec) -> None:
        self.model, self.spec = model, spec
        self.values = {n: t.clone() for n, t in checkpoints.trained_state(model).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, counted from 1."""
        weight = 1 - self.spec.at(step)
        now = self.model.state_dict()  # each time: a module may replace its buffers
        for name, average in self.values.items():
            if average.is_floating_point():
                average.lerp_(now[name], weight)
            else:
                average.copy_(now[name])

    def restore(self, saved: Mapping[str, Tensor], path: object) -> None:
        """Raises CheckpointError where a checkpoint to go on from holds none."""
        if saved.keys() != self.values.keys():
            raise CheckpointError(f"{path} holds no averaged weights to resume from")
        for name, average in self.values.items():
            average.copy_(placed(saved[name], average))


@contextlib.contextmanager
def as_saved(
    model: DGSSModel, averages: Averages | None, group: Processes
) -> Iterator[dict[str, Tensor]]:
    """The model as the run's files will give it back, its training over, in every process alike:
    averaged where the run averages, with the first process's running statistics. Afterwards it is
    what it was, to the bit. Yields its trained tensors.
    """
    live = checkpoints.trained_state(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changing = live if averages else {n: t for n, t in live.items() if n not in parameters}
    kept = {name: tensor.clone() for name, tensor in changing.items()}
    modes = {module: module.training for module in model.modules()}
    progress, model.decoder.progress = model.decoder.progress, 1.0
    try:
        if averages is not None:
            take(model, averages)
        group.same_buffers(model)
        yield live
    finally:
        with torch.no_grad():
            for name, tensor in kept.items():
                live[name].copy_(tensor)
        for module, training in modes.items():
            module.training = training
        model.decoder.progress = progress


@torch.no_grad()
def take(model: DGSSModel, averages: Averages) -> None:
    """Give the model its averages, in evaluation mode."""
    live = checkpoints.trained_state(model.eval())
    for name, average in averages.values.items():
        live[name].copy_(average)
