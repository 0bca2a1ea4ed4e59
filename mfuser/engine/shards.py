"""A model in shards over the processes (PyTorch's FSDP2), where it does not fit into each of them.

Every process keeps its share of all weights, frozen ones too, of the gradients and of the
optimizer's state. The weights of an encoder's block are gathered when it is their turn, and
dropped again after it; what is not in a block stays gathered from the forward to the end of the
backward pass. Files hold whole tensors: a run goes on, and its model is used, without any of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mfuser.engine.layers import stacks
from mfuser.errors import MFuserError
from mfuser.interfaces import VisionBackbone
from mfuser.model.dgss import DGSSModel

_NUMBERS: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
"""Names of trained parameters that are single numbers; in shards they have an axis of size 1."""


def shard(model: DGSSModel, device: torch.device, count: int) -> list[str]:
    """Share out a model that lies on the CPU among `count` processes; a process's share comes to
    its device block by block. Returns the names of backbones that do not say which their blocks
    are, and so are gathered whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # Single numbers cannot be divided: frozen ones stay whole, those that train get an axis.
    numbers = {name: p for name, p in model.named_parameters() if p.ndim == 0}
    for parameter in numbers.values():
        value = parameter.detach().to(device)
        parameter.data = value.reshape(1) if parameter.requires_grad else value
    _NUMBERS[model] = frozenset(name for name, p in numbers.items() if p.requires_grad)
    ignored = {p for p in numbers.values() if not p.requires_grad}
    mesh = init_device_mesh(device.type, (count,))
    unsplit: list[str] = []
    for part in _units(model, unsplit):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    for module in model.modules():
        if isinstance(module, FSDPModule) and device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
    return unsplit


def _units(model: DGSSModel, unsplit: list[str]) -> Iterator[nn.Module]:
    """Modules that are gathered as a whole: blocks of all towers, and fusion adapters."""
    seen: set[nn.Module] = set()
    for name, backbone in model.named_modules():
        if not isinstance(backbone, VisionBackbone):
            continue
        try:
            blocks = [one for stack in stacks(backbone).values() for one in stack]
        except MFuserError:
            unsplit.append(name)
            continue
        for block in map(backbone.get_submodule, blocks):
            if block not in seen:  # a backbone may be inside another
                seen.add(block)
                yield block
    yield from model.encoder.adapters.values()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with what all processes hold of it; each of them asks, in the same order."""
    gather = getattr(tensor, "full_tensor", None)  # a DTensor, whose import is slow
    return tensor if gather is None else gather()


def gathered(model: nn.Module, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors of the model or its optimizer whole, in the memory of the machine, for the processes
    that keep them; the others' are empty. Called by all."""
    numbers = _NUMBERS.get(model, frozenset())
    found = {}
    for name, tensor in tensors.items():
        one = whole(tensor.detach())
        if name in numbers or name.partition(".")[2] in numbers:  # "exp_avg.NAME"
            one = one.reshape(())
        if keep:
            found[name] = one.to("cpu", copy=True)
    return found


def placed(value: Tensor, like: Any) -> Tensor:
    """A copy of a whole tensor on the device of another, or of this process's share of it where
    that one is in shards."""
    value = value.to(like.device, copy=True)
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, places = like.device_mesh, like.placements
    # Every process has the whole: nothing is sent.
    return distribute_tensor(value.reshape(like.shape), mesh, places, src_data_rank=None)


def as_in(model: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors for a model's state dict: of those that are in shards there, the shares.
    What does not fit stays as it is."""

    def one(tensor: Tensor, like: Tensor | None) -> Tensor:
        if like is None or not hasattr(like, "full_tensor"):
            return tensor
        number = tensor.ndim == 0 and like.shape == (1,)
        return placed(tensor, like) if number or tensor.shape == like.shape else tensor

    return {name: one(tensor, model.get(name)) for name, tensor in tensors.items()}
