"""Backend `associative`: the scan in standard operators alone, without a loop over the sequence.

For exported programs (torch.export, ONNX), which cannot contain custom operators: `auto` selects it
while a model is exported. The maps h -> a h + b compose associatively (Blelloch 1990; Martin &
Cundy, ICLR 2018), so log2(T) doublings yield every state of a chunk of T steps, and log2(K) more
propagate the states across K chunks. It needs several times B L D N numbers of memory; everywhere
else, use another backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser_kernels.scan.inputs import ScanInputs
from mfuser_kernels.scan.reference import compute_dtype

CHUNK = 32


def unusable() -> str:
    return ""


def refuses(device: str, dtype: torch.dtype, initial_state: bool) -> str:
    return ""


def scan(x: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return out (B, L, D) in the dtype of u and the last state (B, D, N)."""
    dtype = compute_dtype(x.u.dtype)
    u, delta = x.u.to(dtype), x.delta.to(dtype)  # (B, L, D)
    if x.delta_bias is not None:
        delta = delta + x.delta_bias.to(dtype)
    if x.delta_softplus:
        delta = F.softplus(delta)
    decay = torch.exp(delta[..., None] * x.A.to(dtype))  # (B, L, D, N)
    added = (delta * u)[..., None] * _per_channel(x.B.to(dtype), x)
    state = None if x.initial_state is None else x.initial_state.to(dtype)
    states = _states(decay, added, state)
    y = (states * _per_channel(x.C.to(dtype), x)).sum(-1)
    if x.D is not None:
        y = y + x.D.to(dtype) * u
    if x.z is not None:
        z = x.z.to(dtype)
        y = y * (z * torch.sigmoid(z))  # silu; the backward of F.silu has no forward mode
    return y.to(x.u.dtype), states[:, -1]


def _per_channel(m: Tensor, x: ScanInputs) -> Tensor:
    """(D, N) or (B, L, G, N) -> a tensor that broadcasts with (B, L, D, N)."""
    if m.dim() == 2 or m.shape[2] == 1:
        return m
    return m.repeat_interleave(x.width // m.shape[2], dim=2)


def _states(decay: Tensor, added: Tensor, initial: Tensor | None) -> Tensor:
    """h_t = decay_t h_(t-1) + added_t for every t: (B, L, D, N)."""
    length = decay.shape[1]
    steps = min(CHUNK, length)
    chunks = -(-length // steps)
    pad = (0, 0, 0, 0, 0, chunks * steps - length)
    # Padding steps multiply by 1 and add 0, so they leave the last state unchanged.
    a = F.pad(decay, pad, value=1.0).unflatten(1, (chunks, steps))  # (B, K, T, D, N)
    b = F.pad(added, pad).unflatten(1, (chunks, steps))
    a, b = _prefixes(a, b, 2)
    a_end, b_end = _prefixes(a[:, :, -1], b[:, :, -1], 1)  # (B, K, D, N)
    if initial is None:
        initial = torch.zeros_like(b_end[:, 0])
    b_end = a_end * initial[:, None] + b_end
    before = torch.cat([initial[:, None], b_end[:, :-1]], 1)  # of each chunk
    b = b + a * before[:, :, None]
    return b.flatten(1, 2)[:, :length]


def _prefixes(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Compositions of all steps up to each one along `dim` (Hillis & Steele 1986)."""
    length, shift = a.shape[dim], 1
    while shift < length:
        early = (a.narrow(dim, 0, length - shift), b.narrow(dim, 0, length - shift))
        late = (a.narrow(dim, shift, length - shift), b.narrow(dim, shift, length - shift))
        b = torch.cat([b.narrow(dim, 0, shift), late[0] * early[1] + late[1]], dim)
        a = torch.cat([a.narrow(dim, 0, shift), late[0] * early[0]], dim)
        shift *= 2
    return a, b
