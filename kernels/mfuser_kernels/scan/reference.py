"""The selective scan, step by step: the definition of the operator, ground truth of its tests.

For each batch item and channel d, with N states (Mamba, arXiv 2312.00752, equation 2 with the
discretization of its section 3.2; MFuser, arXiv 2504.03193, uses it unchanged inside MVFuser):

    delta_t = softplus(delta_t + delta_bias)          bias and softplus are both optional
    h_t[n]  = exp(delta_t A[d, n]) h_{t-1}[n] + delta_t B_t[n] u_t
    y_t     = sum_n C_t[n] h_t[n] + D[d] u_t          the skip D is optional
    out_t   = y_t silu(z_t)                           the gate z is optional
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser_kernels.scan.inputs import ScanInputs


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is computed, with its state, in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unusable() -> str:
    return ""


def refuses(device: str, dtype: torch.dtype, initial_state: bool) -> str:
    return ""


def scan(x: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return out (B, L, D) in the dtype of u and the last state (B, D, N).

    Plain autograd gives every gradient. The time axis is unbound once: indexing it inside the
    loop would make each step's backward allocate the whole sequence, quadratic in L.
    """
    dtype = compute_dtype(x.u.dtype)
    u, A = x.u.to(dtype), x.A.to(dtype)  # (B, L, D), (D, N)
    delta = x.delta.to(dtype)
    if x.delta_bias is not None:
        delta = delta + x.delta_bias.to(dtype)
    if x.delta_softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(x.batch, x.width, x.states)  # (B, D, N)
    if x.initial_state is not None:
        state = state + x.initial_state.to(dtype)
    Bs, Cs = (per_step(m.to(dtype), x) for m in (x.B, x.C))  # L times (B or 1, D, N)
    ys = []
    steps = zip(u.unbind(1), delta.unbind(1), Bs, Cs, strict=True)
    for u_t, delta_t, B_t, C_t in steps:  # (B, D), (B, D), (B, D, N), (B, D, N)
        decay = torch.exp(delta_t[..., None] * A)
        state = decay * state + (delta_t * u_t)[..., None] * B_t
        ys.append((state * C_t).sum(-1))
    y = torch.stack(ys, 1)  # (B, L, D)
    if x.D is not None:
        y = y + x.D.to(dtype) * u
    if x.z is not None:
        z = x.z.to(dtype)
        y = y * (z * torch.sigmoid(z))  # silu; the backward of F.silu has no forward mode
    return y.to(x.u.dtype), state


def per_step(m: Tensor, x: ScanInputs) -> list[Tensor]:
    """B or C, given as (D, N) or (B, L, G, N), as one (B, D, N) for each step."""
    if m.dim() == 2:
        return [m[None]] * x.length
    repeat = x.width // m.shape[2]
    return [g.repeat_interleave(repeat, dim=1) for g in m.unbind(1)]
