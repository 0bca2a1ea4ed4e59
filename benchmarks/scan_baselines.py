"""Other implementations of the scan, for comparison, each as in its project.

Each takes u, delta, A, B, C, D, delta_bias with softplus, and returns out; `given` lays tensors
out as each project's own model does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[..., Tensor]


def mamba_ref(u, delta, A, B, C, D, delta_bias):
    """The steps of mamba-ssm's selective_scan_ref: all decays at once, then a loop over time.

    u, delta (B, D, L), B, C (B, N, L), out (B, D, L).
    """
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state = A.new_zeros(u.shape[0], *A.shape)
    ys = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return torch.stack(ys, 2) + u * D[:, None]


def transformers_slow(u, delta, A, B, C, D, delta_bias):
    """The steps of transformers' MambaMixer without its kernels.

    u (B, D, L), delta (B, L, D), B, C (B, L, N), out (B, D, L).
    """
    delta = F.softplus(delta + delta_bias).transpose(1, 2)
    decay = torch.exp(A[None, :, None, :] * delta[..., None])
    drive = delta[..., None] * B[:, None].float() * u[..., None].float()
    state = A.new_zeros(u.shape[0], *A.shape)
    ys = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        ys.append(torch.matmul(state.to(u.dtype), C[:, t].unsqueeze(-1))[:, :, 0])
    return torch.stack(ys, -1) + u * D[None, :, None]


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


# Tensors that a project's model keeps with time last; all others are (B, L, D) and (B, L, N).
TIME_LAST = {"mamba_ref": ("u", "delta", "B", "C"), "transformers": ("u",)}


def given(name: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `x`, (B, L, D) and (B, L, N), contiguous in the layout that `name` works in.

    It matters: from views of (B, L, D), mamba_ref takes half the time, since its loop over time
    then reads neighboring memory. mamba-ssm's own model hands it (B, D, L).
    """
    swap = TIME_LAST.get(name, ())
    return {k: t.transpose(1, 2).contiguous() if k in swap else t for k, t in x.items()}


def baselines(compiled: bool = False) -> dict[str, Scan]:
    """The implementations that can run here; compiling the compiled one takes about a minute."""
    found: dict[str, Scan] = {"mamba_ref": mamba_ref, "transformers": transformers_slow}
    if importlib.util.find_spec("mambapy"):
        found["mambapy"] = mambapy_pscan
    if compiled:
        found["associative_scan"] = torch.compile(_associative)
    return found
