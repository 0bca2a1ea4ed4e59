"""Batch norm over the crops of several processes on CPUs; torch's own runs on GPUs only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the only name for all of them


class _Group:
    """Processes that norms talk to, apart from the gradients; copies of a model share it."""

    def __init__(self) -> None:
        self.group: Any = dist.new_group()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self


class _Sum(torch.autograd.Function):
    """The sum over the processes; their gradients add up too, since each sum reaches all losses."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: _Group) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group.group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group.group)
        return total, None


class SharedBatchNorm(_BatchNorm):
    """A batch norm whose statistics while training are of the crops of all processes."""

    def __init__(self, norm: _BatchNorm, group: _Group) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.group = group
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # as many axes as the norm had that it replaces

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        along = (1, -1, *[1] * (x.ndim - 2))
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        count = values.new_full((1,), values.numel() / values.shape[1])
        sums = _Sum.apply(torch.cat([values.sum(axes), count]), self.group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = values - mean.view(along)
        variance = _Sum.apply(centered.square().sum(axes), self.group) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        normed: Tensor = centered * (variance + self.eps).rsqrt().view(along)
        if self.affine:
            normed = normed * self.weight.view(along) + self.bias.view(along)
        return normed.to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as torch's norm does."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum
        if share is None:
            share = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def share_statistics(model: nn.Module) -> None:
    """Replace the batch norms of a model on CPUs; parameters and buffers stay the same objects."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        and child.track_running_stats
    ]
    if found:
        group = _Group()
        for parent, name, norm in found:
            setattr(parent, name, SharedBatchNorm(norm, group))
