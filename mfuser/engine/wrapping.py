"""A model made ready for training, by one process or by several that average their gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mfuser.engine.batch_norm import share_statistics
from mfuser.engine.console import Console
from mfuser.engine.processes import Processes
from mfuser.interfaces import IGNORE
from mfuser.model.dgss import DGSSModel


def lay_out(group: Processes, model: DGSSModel) -> None:
    """What replaces parts of the model, before anybody refers to them."""
    if group.count == 1:
        return
    if group.accelerator.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        share_statistics(model)


def wrap(
    group: Processes, model: DGSSModel, optimizer: torch.optim.Optimizer, console: Console
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model to call in training, on its device, and the optimizer to step."""
    accelerator = group.accelerator
    if group.count > 1:
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
