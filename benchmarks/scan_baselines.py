"""Other ways to compute the scan, for comparison: what each project does, on (B, L, D) inputs.

Each takes u, delta, A, B, C, D, delta_bias with softplus, B and C as (B, L, N), and returns out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[..., Tensor]


def mamba_ref(u, delta, A, B, C, D, delta_bias):
    """The steps of mamba-ssm's selective_scan_ref: all decays at once, a loop that indexes time."""
    u, delta = u.float().transpose(1, 2), delta.float().transpose(1, 2)
    B, C = B.float().transpose(1, 2), C.float().transpose(1, 2)
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state = A.new_zeros(u.shape[0], *A.shape)
    ys = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return (torch.stack(ys, 2) + u * D[:, None]).transpose(1, 2)


def transformers_slow(u, delta, A, B, C, D, delta_bias):
    """The steps of transformers' MambaMixer without its kernels."""
    u, delta = u.transpose(1, 2), delta.transpose(1, 2)
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(A[None, :, None, :] * delta[..., None])
    drive = delta[..., None] * B[:, None].float() * u[..., None].float()
    state = A.new_zeros(u.shape[0], *A.shape)
    ys = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        ys.append(torch.matmul(state.to(u.dtype), C[:, t].unsqueeze(-1))[:, :, 0])
    return (torch.stack(ys, -1) + u * D[None, :, None]).transpose(1, 2)


def mambapy_pscan(u, delta, A, B, C, D, delta_bias):
    """mambapy's parallel scan (pip install mambapy)."""
    from mambapy.pscan import pscan

    delta = F.softplus(delta + delta_bias)
    decay = torch.exp(delta[..., None] * A)
    states = pscan(decay, (delta * u)[..., None] * B[:, :, None])
    return (states @ C[..., None]).squeeze(3) + D * u


def _associative(u, delta, A, B, C, D, delta_bias):
    from torch._higher_order_ops.associative_scan import associative_scan

    delta = F.softplus(delta + delta_bias)
    decay = torch.exp(delta[..., None] * A)
    drive = (delta * u)[..., None] * B[:, :, None]

    def then(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    _, states = associative_scan(then, (decay, drive), dim=1, combine_mode="generic")
    return (states * C[:, :, None]).sum(-1) + D * u


def baselines(compiled: bool = False) -> dict[str, Scan]:
    """Those that can run here; the compiled one takes about a minute to compile."""
    found: dict[str, Scan] = {"mamba_ref": mamba_ref, "transformers": transformers_slow}
    if importlib.util.find_spec("mambapy"):
        found["mambapy"] = mambapy_pscan
    if compiled:
        found["associative_scan"] = torch.compile(_associative)
    return found
