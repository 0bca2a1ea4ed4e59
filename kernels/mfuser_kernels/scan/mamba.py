"""Backend `mamba_ssm`: the CUDA kernel of the mamba-ssm package, where that is installed."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from mfuser_kernels.scan import autograd, reference
from mfuser_kernels.scan.inputs import ScanInputs

MODULE = "mamba_ssm.ops.selective_scan_interface"
# Since 2.3.2 (its pull request 977, July 2026) mamba-ssm leaves Mamba-1's kernel out unless told.
INSTALL = 'MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation "mfuser[mamba]"'
ONLY = "backend 'mamba_ssm' has first derivatives in reverse mode only; the other backends have all"


@functools.cache
def unusable() -> str:
    """mamba-ssm may be installed and still not import, or lack its compiled part."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return f"mamba-ssm is not installed (it is never needed): {INSTALL}"
    try:
        module = importlib.import_module(MODULE)
    except Exception as error:  # whatever its import raises, it cannot be used
        return f"mamba-ssm does not import: {type(error).__name__}: {error}"
    if getattr(module, "selective_scan_cuda", None) is None:
        return (
            "mamba-ssm was built without Mamba-1's CUDA kernel (selective_scan_cuda); build it "
            f"again: {INSTALL} --force-reinstall --no-deps --no-binary mamba-ssm mamba-ssm"
        )
    return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"


def refuses(device: str, dtype: torch.dtype, initial_state: bool) -> str:
    if device != "cuda":
        return f"its kernel runs on a GPU, the inputs are on {device}"
    if dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    return "it takes no initial state" if initial_state else ""


def scan(x: ScanInputs) -> tuple[Tensor, Tensor]:
    """Its layout is (B, D, L); it wants one dtype for all that has steps, float32 for the rest."""
    if autograd.inside_transform():
        raise NotImplementedError(ONLY)
    if x.batch == 0:
        return reference.scan(x)
    given: Any = iter(ReverseOnly.apply(*(t for t in x.tensors() if t is not None)))
    guarded: Any = [None if t is None else next(given) for t in x.tensors()]
    u, delta, A, B, C, D, z, bias, _ = guarded
    stepped = [t for t in (u, delta, z, B, C) if t is not None and t.dim() > 2]
    # The widest: none of them is to be rounded on the way in.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in stepped))

    def rows(t: Tensor) -> Tensor:
        return t.to(dtype).transpose(1, 2).contiguous()

    def matrix(m: Tensor) -> Tensor:
        return m.float() if m.dim() == 2 else m.to(dtype).permute(0, 2, 3, 1).contiguous()

    out, last_state = importlib.import_module(MODULE).selective_scan_fn(
        rows(u),
        rows(delta),
        A.float(),
        matrix(B),
        matrix(C),
        None if D is None else D.float(),
        None if z is None else rows(z),
        None if bias is None else bias.float(),
        x.delta_softplus,
        True,
    )
    return out.transpose(1, 2).to(x.u.dtype), last_state


class ReverseOnly(torch.autograd.Function):
    """The same tensors, whose derivatives of any other kind are refused.

    mamba-ssm's function returns gradients that autograd takes for constants. Without this, a
    derivative of them would be zero, or lack a term, without a sign.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        ended: tuple[Tensor, ...] = End.apply(len(grads), *grads, *ctx.saved_tensors)
        return ended

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError(ONLY)


class End(torch.autograd.Function):
    """The first `count` tensors, as functions of all of them that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(ONLY)
