"""Which activations a training computes again instead of keeping them, chosen by free memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass

import psutil
import torch

from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import RecipeSpec
from mfuser.engine.precision import Precision
from mfuser.model.assembly import sketch
from mfuser.model.dgss import DGSSModel
from mfuser.model.precision import frozen_bytes
from mfuser.model.window_batch import Memory
from mfuser.reporting import compatibility

SHARE = 0.8
"""Of the free memory that a step may take: the rest is for kernels' workspace, fragments, data."""
GIB = 2.0**30
_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step. fixed: weights, gradients, optimizer. kept: activations where none
    are computed again, least: where all positions' are. positions: of the encoders."""

    fixed: float
    kept: float
    least: float
    positions: int

    def total(self, recomputed: int) -> float:
        """With the activations of so many positions computed again, one of them at a time."""
        if not recomputed:
            return self.fixed + self.kept
        each = (self.kept - self.least) / self.positions
        return self.fixed + self.kept - each * (recomputed - 1)


def make_ready(model: DGSSModel, recipe: RecipeSpec, device: torch.device) -> list[str]:
    """Give a model the recipe's precision on a device, where it is brought afterwards, and choose
    what it computes again; returns what there is to say. Raises MFuserError for a precision that
    the device does not compute in."""
    precision = Precision.of_training(recipe, device)
    chosen = set_checkpointing(model, recipe, precision)
    if device.type == "cpu" and model.encoder.checkpointing:
        return_freed_memory()
    precision.settle(model)
    return [line for line in (precision.said(model), chosen) if line is not None]


def return_freed_memory(size: int = 2**20) -> None:
    """Let tensors of `size` bytes or more go back to the system as soon as they are freed, for the
    rest of the process (glibc; elsewhere nothing changes).

    By default glibc keeps up to 32 MB of each for later. With activations that come and go twice
    in a step, what it keeps lies between what is in use, and a process holds much more than that.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not Linux, or not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


def set_checkpointing(model: DGSSModel, recipe: RecipeSpec, precision: Precision) -> str | None:
    """Set the encoder as the recipe says; returns what "auto" chose, for people.

    "auto": as few positions as fit into the free memory, shared among the processes of a machine
    where they have no device each, by the estimate that `mfuser describe` prints.
    """
    if recipe.checkpointing != "auto":
        recompute(model, None if recipe.checkpointing else 0)
        return None
    room = free(precision.device)
    if precision.device.type == "cpu":
        room /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = estimate(model.spec, recipe, precision)
    if found is None:
        recompute(model)
        return (
            "checkpointing = auto: this pairing cannot be laid out without values, so that its "
            "memory is not known; activations are computed again"
        )
    wanted = [k for k in range(found.positions + 1) if found.total(k) <= SHARE * room]
    chosen = wanted[0] if wanted else found.positions
    recompute(model, chosen)
    needs = f"{found.total(chosen) / GIB:.1f} of {room / GIB:.1f} GiB that are free"
    if not chosen:
        return f"checkpointing = auto: a step takes about {needs}; all activations are kept"
    which = "all" if chosen == found.positions else f"the last {chosen} of {found.positions}"
    without = f"{found.total(0) / GIB:.1f} GiB without"
    tight = "" if wanted else ", which may not be enough: lower batch_size, raise accumulate"
    return (
        f"checkpointing = auto: activations of {which} positions and of the decoder are computed "
        f"again; a step takes about {needs} ({without}){tight}"
    )


def recompute(model: DGSSModel, positions: int | None = None) -> None:
    """Let the model compute activations again in the backward pass: those of so many of the
    encoders' last positions, and of the decoder; None: of all positions; 0: nothing."""
    model.encoder.checkpointing, model.encoder.checkpointed = positions != 0, positions
    for module in model.decoder.modules():
        if hasattr(module, "checkpointing"):
            setattr(module, "checkpointing", positions != 0)  # noqa: B010


def estimate(spec: PairingSpec, recipe: RecipeSpec, precision: Precision) -> Estimate | None:
    """From the model laid out without weights; None where that cannot be done.

    Activations count as if all were float32, though autocast keeps some in half.
    """
    laid_out = sketch(spec)
    image = torch.empty(1, 3, *spec.image_size, device="meta")
    found = []
    for positions in (0, None):
        recompute(laid_out, positions)
        memory = compatibility.memory(laid_out, image)
        if memory is None:
            return None
        found.append(memory)
    weights, trained, one = found[0].values()
    lowered = frozen_bytes(laid_out) - frozen_bytes(laid_out, precision.frozen)
    positions, batch = len(laid_out.encoder.schedule), recipe.batch_size * GIB
    least = min(one, list(found[1].values())[2])
    return Estimate((weights + trained) * GIB - lowered, batch * one, batch * least, positions)


def free(device: torch.device) -> float:
    """Bytes that are free on a device; on CPUs those that programs can take without swapping."""
    if device.type == "cuda":
        return float(Memory(device).free())
    if device.type == "mps":
        used = torch.mps.current_allocated_memory()
        return float(torch.mps.recommended_max_memory() - used)
    return float(psutil.virtual_memory().available)
