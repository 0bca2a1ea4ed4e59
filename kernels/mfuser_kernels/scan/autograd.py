"""Derivatives of the scan in every mode, and vmap.

Gradients are computed by the backend that ran the forward. Tangents (forward mode) and derivatives
of gradients are obtained by differentiating the step-by-step equations of reference.py, at their
cost in time and memory. vmap turns the mapped axis into additional channels of a single scan, with
B and C in separate groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mfuser_kernels.scan import op, reference
from mfuser_kernels.scan.inputs import TENSORS, ScanInputs

Tensors = tuple[Tensor, ...]
Pull = Callable[[Tensors], Tensors]
Optionals = Sequence[Tensor | None]


class Scan(torch.autograd.Function):
    """The scan; arguments and results are those of the operator `selective_scan`."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        return tuple(op.selective_scan_forward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:TENSORS], output[2])
        ctx.save_for_forward(*inputs[:TENSORS])
        ctx.delta_softplus, _, ctx.backend = inputs[TENSORS:]

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        d_out, d_last_state, _ = d_outputs
        if d_out is None and d_last_state is None:
            return (None,) * (TENSORS + 3)
        arguments = (*tensors, d_out, d_last_state, saved, ctx.delta_softplus, ctx.backend)
        grads = iter(ScanBackward.apply(*arguments))
        return (*(None if t is None else next(grads) for t in tensors), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        equations = Equations(ctx.saved_tensors[:TENSORS], ctx.delta_softplus)
        return (*equations.tangents(equations.scan, tangents[:TENSORS]), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        fold = Fold(info.batch_size, in_dims, arguments)
        delta_softplus, _, backend = arguments[TENSORS:]
        # The caller's flag was computed inside vmap, where requires_grad may be hidden. A backward
        # that is itself mapped folds on its own and recomputes what the forward did not save.
        training = needs_gradients(fold.tensors)
        out, last_state, saved = Scan.apply(*fold.tensors, delta_softplus, training, backend)
        return (fold.undo(out, ROWS), fold.undo(last_state, STATE), saved), (ROWS, STATE, None)


class ScanBackward(torch.autograd.Function):
    """Its gradients; arguments are those of the operator `selective_scan_backward`."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        """Gradients of the tensors that are not None."""
        grads = op.selective_scan_backward(*arguments)
        return tuple(
            grad for grad, t in zip(grads, arguments[:TENSORS], strict=False) if t is not None
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.save_for_backward(*inputs[: TENSORS + 2])
        ctx.save_for_forward(*inputs[: TENSORS + 2])
        ctx.delta_softplus = inputs[-2]

    @staticmethod
    def backward(ctx: Any, *d_grads: Tensor) -> tuple[Tensor | None, ...]:
        equations = Equations(ctx.saved_tensors, ctx.delta_softplus)
        _, pull = vjp(equations.gradients, *equations.given)
        found = iter(pull(d_grads))
        return (*(None if t is None else next(found) for t in ctx.saved_tensors), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensors:
        equations = Equations(ctx.saved_tensors, ctx.delta_softplus)
        return equations.tangents(equations.gradients, tangents[: TENSORS + 2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        fold = Fold(info.batch_size, in_dims, arguments)
        d_out, d_last_state, saved = arguments[TENSORS : TENSORS + 3]
        d_out = fold(d_out, in_dims[TENSORS], ROWS)
        d_last_state = fold(d_last_state, in_dims[TENSORS + 1], STATE)
        nothing = saved.new_empty(0)
        grads = ScanBackward.apply(
            *fold.tensors, d_out, d_last_state, nothing, *arguments[TENSORS + 3 :]
        )
        axes = [axis for t, axis in zip(fold.tensors, fold.axes, strict=True) if t is not None]
        return tuple(map(fold.undo, grads, axes)), tuple(axes)


def inside_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, ...) is active."""
    # torch.autograd.Function uses the same call; there is no public one.
    return bool(torch._C._are_functorch_transforms_active())


def needs_gradients(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _differentiable(*arguments: Any) -> Tensors:
    if inside_transform():  # on this error torch.compile breaks the graph and calls Scan instead
        raise NotImplementedError(
            "the operator mfuser::selective_scan supports no torch.func transform except vmap; "
            "call mfuser_kernels.selective_scan, and not inside torch.compile(fullgraph=True)"
        )
    results: Tensors = Scan.apply(*arguments)
    return results


op.library.impl("selective_scan", _differentiable, "Autograd")


class Equations:
    """The scan and its gradients as functions of tensors only, built from torch's own operators.

    tensors: the nine of ScanInputs; for `gradients`, followed by d_out and d_last_state. The
    functions take those that are not None.
    """

    def __init__(self, tensors: Optionals, delta_softplus: bool) -> None:
        self.there = [t is not None for t in tensors]
        self.given = tuple(t for t in tensors if t is not None)
        self.delta_softplus = delta_softplus

    def scan(self, *given: Tensor) -> Tensors:
        """out and the last state."""
        places = iter(given)
        tensors = (next(places) if there else None for there in self.there[:TENSORS])
        inputs: Any = (*tensors, self.delta_softplus)
        return reference.scan(ScanInputs(*inputs))

    def gradients(self, *given: Tensor) -> Tensors:
        """Gradients of those of the nine tensors that are not None."""
        count = sum(self.there[:TENSORS])
        outputs, pull = vjp(self.scan, *given[:count])
        d_given = iter(given[count:])
        d_outputs = (
            next(d_given) if there else torch.zeros_like(output)
            for output, there in zip(outputs, self.there[TENSORS:], strict=True)
        )
        return pull(tuple(d_outputs))

    def tangents(self, function: Callable[..., Tensors], tangents: Optionals) -> Tensors:
        """Tangents of the results of one of the functions above, at `given`.

        Reverse mode applied twice: the vjp is linear in its argument, and its transpose is the
        jvp. torch.func.jvp does not work here, because forward mode cannot be nested.
        """
        outputs, pull = vjp(function, *self.given)
        _, push = vjp(lambda *d_outputs: pull(d_outputs), *map(torch.zeros_like, outputs))
        of_given = [t for t, there in zip(tangents, self.there, strict=True) if there]
        filled = (
            torch.zeros_like(primal) if t is None else t
            for t, primal in zip(of_given, self.given, strict=True)
        )
        return push(tuple(filled))


def vjp(function: Callable[..., Tensors], *primals: Tensor) -> tuple[Tensors, Pull]:
    """The results, and the function that maps their gradients to gradients of the primals."""
    found: Any = torch.func.vjp(function, *primals)
    results, pull = found
    return results, pull


# Axis of the channels, or of the groups of channels, in each kind of tensor.
ROWS, MATRIX, STATE, WEIGHTS = 2, 2, 1, 0


class Fold:
    """The inputs of `size` scans as those of one with `size` times as many channels and groups."""

    def __init__(self, size: int, in_dims: Sequence[int | None], tensors: Optionals) -> None:
        """in_dims: axis of each tensor that runs over the scans, None if they share the tensor."""
        self.size = size

        def matrix(i: int) -> int:
            m = tensors[i]
            assert m is not None
            return MATRIX if m.dim() - (in_dims[i] is not None) == 4 else WEIGHTS

        # u, delta, A, B, C, D, z, delta_bias, initial_state
        self.axes = (ROWS, ROWS, WEIGHTS, matrix(3), matrix(4), WEIGHTS, ROWS, WEIGHTS, STATE)
        self.tensors = tuple(map(self, tensors, in_dims, self.axes))

    def __call__(self, t: Tensor | None, in_dim: int | None, axis: int) -> Tensor | None:
        """Fold one tensor; axis is that of its channels."""
        if t is None:
            return None
        t = t.expand(self.size, *t.shape) if in_dim is None else t.movedim(in_dim, 0)
        return t.movedim(0, axis).flatten(axis, axis + 1)

    def undo(self, t: Tensor, axis: int) -> Tensor:
        """Split the scans off again, as an axis before that of the channels."""
        split = (self.size, t.shape[axis] // self.size)
        return t.reshape(*t.shape[:axis], *split, *t.shape[axis + 1 :])
