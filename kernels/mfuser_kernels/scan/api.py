"""The public function: checks its arguments, converts to (B, L, D) and calls the operator."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from mfuser_kernels.scan import associative, autograd, backends, mamba, op, reference
from mfuser_kernels.scan.inputs import ScanInputs, check

# Backends with an autograd of their own.
COMPOSITE = {
    "reference": reference.scan,
    "associative": associative.scan,
    "mamba_ssm": mamba.scan,
}


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
    *,
    initial_state: Tensor | None = None,
    layout: str = "bdl",
    backend: str = "auto",
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = None,
    layout: str = "bdl",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    layout: str = "bdl",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of Mamba (arXiv 2312.00752, section 3), with every gradient.

    Calls to mamba-ssm's `selective_scan_fn` work unchanged; `scan/reference.py` states the
    equations.

    Args:
        u: input, (B, D, L), or (B, L, D) with layout "bld".
        delta: step size before bias and softplus, the shape of u, dimensionless.
        A: state decay, real, (D, N); usually negative.
        B: input matrix. Constant over time, (D, N), or one per step: (B, N, L) or
            (B, G, N, L) in layout "bdl", (B, L, N) or (B, L, G, N) in layout "bld", where
            each of the G groups serves D / G neighboring channels.
        C: output matrix, shaped like any B.
        D: skip weight, (D,).
        z: gate, the shape of u; the output is multiplied by silu(z).
        delta_bias: added to delta, (D,).
        delta_softplus: apply softplus to delta after the bias.
        return_last_state: also return the state after the last step.
        initial_state: state before the first step, (B, D, N); zero if not given.
        layout: "bdl" as in mamba-ssm, or "bld", which needs no transposing copy.
        backend: "auto", or a name that `mfuser_kernels.backends()` lists. The environment
            variable MFUSER_SCAN_BACKEND overrides "auto".

    Returns:
        out in the shape, layout and dtype of u, contiguous; with return_last_state, also the last
        state, (B, D, N) in float32 (float64 if u is).

    Raises:
        ScanError: a ValueError: shapes that do not fit, a complex or integer tensor, tensors on
            different devices, an unknown backend or one that cannot run here.
        NotImplementedError: a derivative other than the gradient, from backend "mamba_ssm".
    """
    tensors = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
    }
    check(tensors, layout)
    B, C = to_bld(B, layout), to_bld(C, layout)
    if B.dim() == 4 and C.dim() == 4 and B.shape[2] != C.shape[2]:
        groups = math.lcm(B.shape[2], C.shape[2])
        B, C = (m.repeat_interleave(groups // m.shape[2], dim=2) for m in (B, C))
    if layout == "bdl":
        u, delta = u.transpose(1, 2), delta.transpose(1, 2)
        z = None if z is None else z.transpose(1, 2)
    name = backends.choose(backend, u.device.type, u.dtype, initial_state is not None)
    x = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus)
    if name in COMPOSITE:
        out, last_state = COMPOSITE[name](x)
    else:
        # torch.compile rejects an autograd.Function that has a jvp, but accepts the operator.
        run = op.selective_scan if torch.compiler.is_compiling() else autograd.Scan.apply
        training = autograd.needs_gradients(x.tensors())
        out, last_state, _ = run(*x.tensors(), delta_softplus, training, name)
    if layout == "bdl":
        out = out.transpose(1, 2).contiguous()  # so that .view works, as with mamba-ssm
    return (out, last_state) if return_last_state else out


def to_bld(m: Tensor, layout: str) -> Tensor:
    """B or C as (D, N), unchanged, or as (B, L, G, N)."""
    if m.dim() == 3:
        return m.transpose(1, 2).unsqueeze(2) if layout == "bdl" else m.unsqueeze(2)
    if m.dim() == 4 and layout == "bdl":
        return m.permute(0, 3, 1, 2)
    return m
