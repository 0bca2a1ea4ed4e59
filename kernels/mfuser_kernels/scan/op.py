"""The torch operators: schemas, shapes for tracing, and the count of floating-point operations.

`selective_scan` has derivatives (autograd.py); it consists of `selective_scan_forward` and
`selective_scan_backward`, which torch.compile sees as two opaque calls, so that every backend
survives it, autocast, checkpointing and FlopCounterMode alike. They are registered with
torch.library.Library: the first call of an operator made by torch.library.custom_op imports
torch._dynamo, 1.4 s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mfuser_kernels.scan import backends, memory
from mfuser_kernels.scan.inputs import TENSORS, ScanInputs
from mfuser_kernels.scan.reference import compute_dtype

# As in ScanInputs.
NINE = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state"
)
FORWARD = f"({NINE}, bool delta_softplus, bool training, str backend) -> (Tensor, Tensor, Tensor)"
# Always nine results: torch.autograd.grad(is_grads_batched=True) can take no list.
BACKWARD = (
    f"({NINE}, Tensor? d_out, Tensor? d_last_state, Tensor saved, "
    f"bool delta_softplus, str backend) -> ({', '.join(['Tensor'] * TENSORS)})"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, L, D), last state (B, D, N), and what the backend keeps for its backward."""
    *inputs, training, backend = arguments
    x = ScanInputs(*inputs)
    if x.batch == 0:
        return _fake_forward(*arguments)
    if x.u.device.type == "cpu":
        memory.keep_freed()
    out, last_state, saved = map(_plain, backends.module(backend).forward(x, training))
    return out, last_state, saved


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the shapes, dtypes and strides that `_forward` returns, without values."""
    *inputs, training, backend = arguments
    x = ScanInputs(*inputs)
    u, state = x.u, compute_dtype(x.u.dtype)
    keep = backends.module(backend).saved_shape(x) if training else (0,)
    return (
        u.new_empty(u.shape),
        u.new_empty((x.batch, x.width, x.states), dtype=state),
        u.new_empty(keep, dtype=state),
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The nine gradients, contiguous, each in the dtype of its tensor; (0,) where that is None.

    If the forward kept nothing (`saved` is empty), it is run again.
    """
    d_out, d_last_state, saved, delta_softplus, backend = arguments[TENSORS:]
    inputs: Any = (*arguments[:TENSORS], delta_softplus)
    x = ScanInputs(*inputs)
    if x.batch == 0:
        return tuple(map(torch.zeros_like, _fake_backward(*arguments)))
    run = backends.module(backend)
    if not saved.numel():
        saved = run.forward(x, True)[2]
    grads = run.backward(x, d_out, d_last_state, saved)
    return tuple(
        x.u.new_empty(0) if t is None else _plain(g.to(t.dtype).reshape(t.shape))
        for g, t in zip(grads, x.tensors(), strict=True)
    )


def _plain(t: Tensor) -> Tensor:
    """Contiguous in memory of its own, as fake tensors and tangents are.

    Compiled code relies on the strides and the offset, forward mode on the size of the memory.
    """
    t = t.contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    u = arguments[0]
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in arguments[:TENSORS])


library = torch.library.Library("mfuser", "FRAGMENT")
for _name, _schema, _run, _fake in (
    ("selective_scan", FORWARD, _forward, _fake_forward),
    ("selective_scan_forward", FORWARD, _forward, _fake_forward),
    ("selective_scan_backward", BACKWARD, _backward, _fake_backward),
):
    library.define(_name + _schema)
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfuser::{_name}", _fake, lib=library)

selective_scan = torch.ops.mfuser.selective_scan.default
selective_scan_forward = torch.ops.mfuser.selective_scan_forward.default
selective_scan_backward = torch.ops.mfuser.selective_scan_backward.default


def scan_flops(batch: int, length: int, width: int, states: int, skip: bool, gate: bool) -> int:
    """Floating-point operations of one forward scan.

    Each state of each channel and step costs 7: delta A, its exponential, the input term, a
    multiply-add of the state and one of the output. Each channel and step adds delta u, 2 for the
    skip, 2 for the gate; softplus and sigmoid count as one.
    """
    return batch * length * width * (7 * states + 2 + 2 * skip + 2 * gate)


@register_flop_formula([torch.ops.mfuser.selective_scan, torch.ops.mfuser.selective_scan_forward])
def _flops(*shapes: Any, **_: Any) -> int:
    u, _delta, A, _B, _C, D, z, *_rest = shapes
    (batch, length, width), states = u, A[1]
    return scan_flops(batch, length, width, states, D is not None, z is not None)


@register_flop_formula(torch.ops.mfuser.selective_scan_backward)
def _flops_backward(*shapes: Any, **_: Any) -> int:
    # Recomputing the states costs one forward, the reverse recurrence and its five sums about two.
    return 3 * _flops(*shapes)
