"""A model made ready for training, by one process or by several that average their gradients: each
with the whole model, or all together with one in shards."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the only name for all of them

from mfuser.config.recipe import RecipeSpec
from mfuser.config.run import RunSpec
from mfuser.engine import checkpoints, shards
from mfuser.engine.batch_norm import share_statistics
from mfuser.engine.console import Console
from mfuser.engine.processes import Processes, asks_for_shards
from mfuser.errors import MFuserError
from mfuser.interfaces import IGNORE
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel


def begin_sharding(group: Processes, recipe: RecipeSpec) -> None:
    """Note whether the model will be in shards. Raises MFuserError for what that cannot do."""
    group.sharded = group.count > 1 and (recipe.shard or asks_for_shards())
    if not group.sharded:
        return
    if recipe.precision == "fp16":
        raise MFuserError(
            'shard = true trains in bfloat16 or float32; set precision = "bf16" or "no" '
            "(--set-recipe precision=bf16)"
        )
    if recipe.validate_every is not None:
        raise MFuserError(
            "validate_every measures the whole model in each process, which shard = true does not "
            "keep; leave one of them out, or evaluate the checkpoints (mfuser evaluate)"
        )


def lay_out(group: Processes, model: DGSSModel, console: Console) -> None:
    """Wrap or replace parts of the model and its parameters, before anything refers to them."""
    device = group.accelerator.device
    if group.count == 1:
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        share_statistics(model)
    if group.sharded:
        for name in shards.shard(model, device, group.count):
            console.say(
                f"{name} does not say which its blocks are (block_modules): it is gathered whole"
            )


def reread(run: RunSpec, folder: Path, kind: str, device: torch.device) -> DGSSModel:
    """The finished model that a run's folder holds, whole: its averages or its last weights."""
    path = folder / (checkpoints.AVERAGED if kind == "averaged" else checkpoints.FINAL)
    model = build_model(run.pairing, seed=run.seed)
    checkpoints.restore(model, checkpoints.read(path), path)
    return model.to(device)


def wrap(
    group: Processes, model: DGSSModel, optimizer: torch.optim.Optimizer, console: Console
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model to call in training, on its device, and the optimizer to step."""
    accelerator = group.accelerator
    if group.sharded:  # which averages the gradients; this is for the precision alone
        whole = accelerator.prepare_model(model, evaluation_mode=True)
        return whole, accelerator.prepare_optimizer(optimizer)
    if dist.is_initialized():  # torchrun's single process is wrapped for several, too
        model.to(accelerator.device)
        left_out = group.together(lambda: without_gradient(model, accelerator))
        if left_out:
            console.say(
                f"{left_out[0]}{f' and {len(left_out) - 1} more' if left_out[1:] else ''} may be "
                "left out of a step by its losses: the processes look for such parameters in every "
                "step (find_unused_parameters), which takes time"
            )
        assert accelerator.ddp_handler is not None
        accelerator.ddp_handler.find_unused_parameters = bool(left_out)
        for parameter in model.parameters():
            if parameter.requires_grad and 1 in parameter.shape:
                parameter.register_hook(partial(_laid_out_as, parameter.stride()))
    wrapped, prepared = accelerator.prepare(model, optimizer)
    return wrapped, prepared


def without_gradient(model: DGSSModel, accelerator: Accelerator) -> list[str]:
    """Trained parameters that do not take part in every step, found by two forward passes.

    Where an image shows many classes, and where nothing of it is labeled: what both losses reach
    has a gradient whatever a crop shows. The model and its buffers stay as they are.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device, (height, width) = accelerator.device, model.spec.image_size
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    reached = set(trained.values())
    try:
        model.train()
        for module in model.modules():  # no statistics of noise, nor a wait for other processes
            if isinstance(module, _BatchNorm):
                module.eval()
        with torch.random.fork_rng(devices=[]), accelerator.autocast():
            torch.manual_seed(0)
            images = torch.rand(1, 3, height, width).to(device)
            shown = torch.randint(len(model.classes), (1, height, width)).to(device)
            for labels in (shown, torch.full_like(shown, IGNORE)):
                losses = model(images, labels)
                reached &= _leaves(torch.stack(list(losses.values())).sum())
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
    return [name for name, parameter in trained.items() if parameter not in reached]


def _leaves(loss: Tensor) -> set[Tensor]:
    """The parameters that a backward pass from here would reach."""
    found: set[Tensor] = set()
    waiting: list[Any] = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(variable)
        for following, _ in getattr(node, "next_functions", ()):
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _laid_out_as(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """A gradient with the parameter's strides also along axes of size 1, where they mean nothing
    to anyone but the buckets, which would be slow and warn (1x1 convolutions have such ones)."""
    pairs = zip(gradient.shape, gradient.stride(), strides, strict=True)
    if all(size == 1 or has == wanted for size, has, wanted in pairs):
        return gradient.as_strided(gradient.shape, strides)
    return gradient
