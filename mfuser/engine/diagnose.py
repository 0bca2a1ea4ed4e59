"""A loss that is not finite: which part it came from, and a file to repeat it with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec
from mfuser.data.loading import Batch
from mfuser.engine import checkpoints
from mfuser.engine.batch_norm import SharedBatchNorm
from mfuser.engine.checkpoints import Checkpoint
from mfuser.engine.compiling import uncompiled
from mfuser.engine.console import Console
from mfuser.engine.pending import Step
from mfuser.engine.processes import Processes, processes
from mfuser.engine.watch import Call, tensors, watched
from mfuser.errors import CheckpointError, MFuserError
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel
from mfuser.plugins.contracts import named

DIVERGED = "diverged.safetensors"
"""The trained weights and the batches of a step whose loss is not finite."""
GROWN = 1e4
"""Trained weights beyond this have run away; those of sound trainings stay below 100."""


class Diverged(MFuserError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Origin:
    """part: the component. name: the module or method in it. largest: magnitude of its inputs."""

    part: str
    name: str
    largest: float

    def __str__(self) -> str:
        return (
            f"the first output that is not finite is that of {self.name}, in {self.part}, whose "
            f"inputs reach {self.largest:.3g}"
        )


class _Found(Exception):
    def __init__(self, origin: Origin) -> None:
        self.origin = origin


def seed_step(seed: int, step: int, rank: int) -> None:
    """The generators of a training step: they depend on nothing that came before it."""
    key = np.random.SeedSequence((seed, step, rank))
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))


def origin(model: DGSSModel, batches: Sequence[Batch], device: torch.device) -> Origin | None:
    """Run the batches forward and stop at the first output with NaN or infinity.

    -inf alone, as masks of attention hold it, counts only if nothing else is found.
    """
    suspect: list[Origin] = []

    def before(call: Call, given: list[Tensor]) -> None:
        if any(t.isnan().any() for t in given):  # computed between two modules
            outer = stack[-2] if len(stack) > 1 else call
            raise _Found(Origin(_of(outer, model), outer.name or "the model", _largest(given)))

    def after(call: Call, given: list[Tensor], result: Any) -> None:
        for tensor in tensors(result):
            if not tensor.isfinite().all():
                found = Origin(_of(call, model), call.name or "the model", _largest(given))
                if (tensor.isnan() | (tensor == math.inf)).any():
                    raise _Found(found)
                suspect.append(found)

    stack: list[Call] = []
    try:
        with torch.no_grad(), uncompiled(model), watched(model, before, after) as stack:
            for batch in batches:
                model(*batch.to(device))
    except _Found as found:
        return found.origin
    return suspect[0] if suspect else None


def _of(call: Call, model: DGSSModel) -> str:
    return "the model's own code" if call.part is model else named(call.part)


def _largest(given: list[Tensor]) -> float:
    """The largest absolute value, infinity included and NaN ignored."""
    sizes = [
        t.detach().abs().nan_to_num(0, posinf=math.inf).max().item() for t in given if t.numel()
    ]
    return max(sizes, default=0.0)


def explain(
    model: DGSSModel,
    run: RunSpec,
    step: int,
    batches: Sequence[Batch],
    losses: dict[str, float],
    accelerator: Accelerator,
    rank: int = 0,
) -> str:
    """The sentence about a step (from 0) that went wrong: loss, origin, images, remedy."""
    for module in model.modules():  # their statistics would wait for the other processes
        if isinstance(module, nn.SyncBatchNorm | SharedBatchNorm):
            module.eval()
    seed_step(run.seed, step, rank)
    with accelerator.autocast():
        found = origin(model, batches, accelerator.device)
    broken = ", ".join(k for k, v in losses.items() if not math.isfinite(v))
    text = f"the loss is {sum(losses.values())} at step {step + 1} ({broken})"
    text += f": {found}" if found else ""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    name, largest = _grown(trained)
    if not largest <= GROWN:
        state = f"has grown to {largest:.3g}" if math.isfinite(largest) else "is not finite"
        text += f"; {name} {state}: lower lr = {run.recipe.lr:g} or set clip_grad"
    names = [name for batch in batches for name in batch.names]
    return f"{text}; the images are {', '.join(names)}"


def _grown(trained: dict[str, nn.Parameter]) -> tuple[str, float]:
    """The trained tensor with the largest value; NaN is larger than any."""
    sizes = {n: float(p.detach().abs().max()) for n, p in trained.items()}
    name = max(sizes, key=lambda n: math.inf if math.isnan(sizes[n]) else sizes[n], default="")
    return name, sizes.get(name, 0.0)


def save(
    path: Path, model: DGSSModel, run: RunSpec, step: int, batches: Sequence[Batch], rank: int
) -> None:
    """Write the weights as they were before the step, and its batches, for `replay`."""
    meta = {
        "pairing": run.pairing.model_dump(mode="json"),
        "run": run.model_dump(mode="json"),
        "step": step,
        "frozen": checkpoints.frozen_fingerprint(model),
        "names": [batch.names for batch in batches],
        "rank": rank,
    }
    read: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        read |= {f"images.{i}": batch.images, f"labels.{i}": batch.labels}
    checkpoints.write(path, Checkpoint(checkpoints.trained_state(model), read, meta))


def diverged(
    model: DGSSModel, run: RunSpec, one: Step, group: Processes, folder: Path, kept: str
) -> Diverged:
    """The error of a process that lost its loss in this step, which is saved to be replayed.

    kept: where the run can go on from. The model's weights are those from before the step.
    """
    model.decoder.progress = one.number / run.recipe.steps  # later steps may have been begun
    given = (model, run, one.number, one.batches)
    said = explain(*given, one.own, group.accelerator, group.rank)
    save(folder / DIVERGED, *given, group.rank)
    return Diverged(
        f"{said}; repeat the step with: mfuser train {run.pairing_name} --out {folder} "
        f"--replay{kept}"
    )


def replay(
    registry: Registry,
    folder: Path,
    *,
    settings: Sequence[str] = (),
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Repeat the step that a run in `folder` ended with; returns its losses, finite now.

    settings: changes to the pairing, to try a remedy. Raises Diverged as the run did, and
    CheckpointError where nothing is to be repeated.
    """
    path = folder / DIVERGED
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no step to replay (there is no {DIVERGED})")
    saved = checkpoints.read(path)
    run = RunSpec.read(registry, saved.meta["run"], str(path))
    spec = registry.saved_pairing(saved.meta["pairing"], settings, str(path))
    with processes(run.recipe.precision, device) as group:
        accelerator = group.accelerator
        model = build_model(spec, seed=run.seed)
        checkpoints.restore(model, saved, path)
        model.to(accelerator.device).train()
        batches = [
            Batch(saved.optimizer[f"images.{i}"], saved.optimizer[f"labels.{i}"], [], names)
            for i, names in enumerate(saved.meta["names"])
        ]
        step, rank = int(saved.meta["step"]), int(saved.meta["rank"])
        seed_step(run.seed, step, rank)
        model.decoder.progress = step / run.recipe.steps
        losses: dict[str, float] = {}
        with torch.no_grad(), accelerator.autocast():
            for batch in batches:
                found = model(*batch.to(accelerator.device))
                for name, value in found.items():
                    losses[name] = losses.get(name, 0.0) + float(value) / len(batches)
        if not all(math.isfinite(value) for value in losses.values()):
            raise Diverged(explain(model, run, step, batches, losses, accelerator, rank))
        return losses
