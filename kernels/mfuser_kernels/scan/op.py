"""The torch operators: shapes for tracing, autograd, and the count of floating-point operations.

Two operators, forward and backward, opaque to torch.compile, so that every backend survives it,
autocast, checkpointing and FlopCounterMode alike. They are registered with torch.library.Library:
the first call of an operator made by torch.library.custom_op imports torch._dynamo, 1.4 s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mfuser_kernels.scan import backends, memory
from mfuser_kernels.scan.inputs import ScanInputs
from mfuser_kernels.scan.reference import compute_dtype

TENSORS = 9  # differentiable arguments, in the order of ScanInputs.tensors()


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    training: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, L, D), last state (B, D, N), and what the backend keeps for its backward."""
    x = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus)
    if u.device.type == "cpu":
        memory.keep_freed()
    return backends.module(backend).forward(x, training)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `_forward` makes of the same arguments, without numbers."""
    *inputs, training, backend = arguments
    x = ScanInputs(*inputs)
    u, state = x.u, compute_dtype(x.u.dtype)
    keep = backends.module(backend).saved_shape(x) if training else (0,)
    return (
        u.new_empty(u.shape),
        u.new_empty((x.batch, x.width, x.states), dtype=state),
        u.new_empty(keep, dtype=state),
    )


def _gradients(
    d_out: Tensor | None,
    d_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of the tensors that are not None, in their order, shapes and dtypes."""
    x = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus)
    grads = backends.module(backend).backward(x, d_out, d_last_state, saved)
    return [
        g.to(t.dtype).reshape(t.shape)
        for g, t in zip(grads, x.tensors(), strict=True)
        if t is not None and g is not None
    ]


def _fake_gradients(d_out: Any, d_last_state: Any, *arguments: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in arguments[:TENSORS] if t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], output[2])
    ctx.delta_softplus, _, ctx.backend = inputs[TENSORS:]


def _backward(
    ctx: Any, d_out: Tensor | None, d_last_state: Tensor | None, d_saved: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    if d_out is None and d_last_state is None:
        return (None,) * (TENSORS + 3)
    grads = iter(
        selective_scan_backward(
            d_out, d_last_state, *tensors, saved, ctx.delta_softplus, ctx.backend
        )
    )
    return (*(None if t is None else next(grads) for t in tensors), None, None, None)


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pass


def _second_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("the selective scan offers no second derivatives; backend 'reference' does")


_library = torch.library.Library("mfuser", "FRAGMENT")
for _name, _run, _fake in (
    ("selective_scan", _forward, _fake_forward),
    ("selective_scan_backward", _gradients, _fake_gradients),
):
    _library.define(_name + torch.library.infer_schema(_run, mutates_args=()))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfuser::{_name}", _fake, lib=_library)

selective_scan = torch.ops.mfuser.selective_scan.default
selective_scan_backward = torch.ops.mfuser.selective_scan_backward.default
torch.library.register_autograd(
    "mfuser::selective_scan", _backward, setup_context=_setup, lib=_library
)
torch.library.register_autograd(
    "mfuser::selective_scan_backward", _second_backward, setup_context=_second_setup, lib=_library
)


def scan_flops(batch: int, length: int, width: int, states: int, skip: bool, gate: bool) -> int:
    """Floating-point operations of one forward scan.

    Each state of each channel and step costs 7: delta A, its exponential, the input term, a
    multiply-add of the state and one of the output. Each channel and step adds delta u, 2 for the
    skip, 2 for the gate; softplus and sigmoid count as one.
    """
    return batch * length * width * (7 * states + 2 + 2 * skip + 2 * gate)


@register_flop_formula(torch.ops.mfuser.selective_scan)
def _flops(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *_: Any, **__: Any) -> int:
    batch, length, width = u
    return scan_flops(batch, length, width, A[1], D is not None, z is not None)


@register_flop_formula(torch.ops.mfuser.selective_scan_backward)
def _flops_backward(
    d_out: Any, d_last: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    # Recomputing the states costs one forward, the reverse recurrence and its five sums about two.
    batch, length, width = u
    return 3 * scan_flops(batch, length, width, A[1], D is not None, z is not None)
