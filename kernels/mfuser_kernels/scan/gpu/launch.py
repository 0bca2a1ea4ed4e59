"""Lays out the tensors for the Triton kernels and launches the phases."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mfuser_kernels.scan.gpu import kernels
from mfuser_kernels.scan.inputs import LOG2_E, ScanInputs

# One warp; multiply-adds fused, which Triton 3.10 no longer does by default.
WARP: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": True}
FORWARD_CHUNK = 96  # 28 chunks of L = 2,594: 896 warps for 2 x 512 channels
BACKWARD_CHUNK = 48  # twice as many: its warps do more and wait longer
# States of one program. Forward: 16 per thread of a warp. Backward: half, since it holds seven such
# tiles; with 512, sm_90 uses all 255 registers and spills, with 256 it uses 221.
FORWARD_TILE, BACKWARD_TILE = 512, 256


def tile(x: ScanInputs, size: int) -> dict[str, int]:
    """N padded to a power of two, and the channels of one program."""
    states = triton.next_power_of_2(x.states)
    return {"NP": states, "BLOCK_D": max(1, min(32, size // states))}


def saved_shape(x: ScanInputs) -> tuple[int, ...]:
    """States every few steps."""
    return (x.batch, -(-x.length // kernels.SAVE_STEPS), x.states, x.width)


class Launch:
    """One scan's tensors, contiguous, and what the kernels are compiled for."""

    def __init__(self, x: ScanInputs, size: int) -> None:
        self.x, self.tile = x, tile(x, size)
        self.u, self.delta = x.u.contiguous(), x.delta.contiguous()
        self.z = self.u if x.z is None else x.z.contiguous()
        self.A = (x.A.double() * LOG2_E).float().t().contiguous()
        self.B, self.C = self.matrix(x.B), self.matrix(x.C)
        zeros = self.float(x.width).zero_()
        self.D = zeros if x.D is None else x.D.float().contiguous()
        self.bias = zeros if x.delta_bias is None else x.delta_bias.float().contiguous()
        self.sizes = (x.length, x.width, x.groups, x.states)
        self.options: dict[str, Any] = {"SOFTPLUS": x.delta_softplus}
        self.const = {"CONST_B": x.B.dim() == 2, "CONST_C": x.C.dim() == 2}
        self.gate = {"GATE": x.z is not None}

    @staticmethod
    def matrix(m: Tensor) -> Tensor:
        return m.float().t().contiguous() if m.dim() == 2 else m.contiguous()

    def float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.u.device)

    def table(self, t: Tensor | None, into: Tensor) -> None:
        """Write a state (B, D, N) as (B, N, D)."""
        if t is None:
            into.zero_()
        else:
            into.copy_(t.transpose(1, 2))

    def grid(self, chunks: int) -> tuple[int, int, int]:
        blocks = triton.cdiv(self.x.width // self.x.groups, self.tile["BLOCK_D"])
        return (self.x.groups * blocks, chunks, self.x.batch)

    def carry(self, own: Tensor, sums: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
        """Phase 2: (B, chunks + 1, N, D), the state before each chunk and after the last."""
        x, chunks = self.x, own.shape[1]
        starts = self.float(x.batch, chunks + 1, x.states, x.width)
        self.table(first, starts[:, 0])
        block = min(32, triton.next_power_of_2(x.width))
        kernels.carry[(x.states, triton.cdiv(x.width, block), x.batch)](
            self.A, own, sums, starts, chunks, x.width, x.states,
            K=min(32, triton.next_power_of_2(chunks)), BLOCK_D=block, REVERSE=reverse, **WARP,
        )  # fmt: skip
        return starts


def forward(x: ScanInputs, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    run = Launch(x, FORWARD_TILE)
    chunks = triton.cdiv(x.length, FORWARD_CHUNK)
    own, sums = run.float(x.batch, chunks, x.states, x.width), run.float(x.batch, chunks, x.width)
    out = torch.empty_like(run.u)
    saved = run.float(*(saved_shape(x) if training else (0,)))
    shape = {"T": FORWARD_CHUNK, **run.tile, **run.options, **WARP}
    if out.numel():
        kernels.chunk_ends[run.grid(chunks)](
            run.u, run.delta, run.A, run.B, run.bias, own, sums, *run.sizes,
            CONST_B=run.const["CONST_B"], **shape,
        )  # fmt: skip
        starts = run.carry(own, sums, x.initial_state, reverse=False)
        kernels.scan_chunks[run.grid(chunks)](
            run.u, run.delta, run.A, run.B, run.C, run.D, run.z, run.bias, starts, out, saved,
            *run.sizes, TRAIN=training, SAVE=kernels.SAVE_STEPS, **run.const, **run.gate, **shape,
        )  # fmt: skip
    else:
        starts = run.float(x.batch, 1, x.states, x.width)
    return out, starts[:, -1].transpose(1, 2).contiguous(), saved


def backward(
    x: ScanInputs, d_out: Tensor | None, d_last_state: Tensor | None, saved: Tensor
) -> list[Tensor | None]:
    run = Launch(x, BACKWARD_TILE)
    chunks = triton.cdiv(x.length, BACKWARD_CHUNK)
    own, sums = run.float(x.batch, chunks, x.states, x.width), run.float(x.batch, chunks, x.width)
    g = torch.zeros_like(run.u) if d_out is None else d_out.contiguous()
    shape = {"T": BACKWARD_CHUNK, **run.tile, **run.options, **run.gate, **WARP}
    kernels.chunk_ends_back[run.grid(chunks)](
        run.delta, run.A, run.C, run.z, run.bias, g, own, sums, *run.sizes,
        CONST_C=run.const["CONST_C"], **shape,
    )  # fmt: skip
    starts = run.carry(own, sums, d_last_state, reverse=True)
    du, d_delta = torch.empty_like(run.u), torch.empty_like(run.delta)
    dz = du if x.z is None else torch.empty_like(run.z)
    dA = run.float(x.batch, chunks, x.states, x.width)
    dD, d_bias = (run.float(x.batch, chunks, x.width) for _ in range(2))
    parts = run.grid(chunks)[0] // x.groups
    dB, dC = (
        run.float(*dA.shape) if m.dim() == 2 else run.float(parts, *m.shape) for m in (x.B, x.C)
    )
    kernels.scan_chunks_back[run.grid(chunks)](
        run.u, run.delta, run.A, run.B, run.C, run.D, run.z, run.bias, g, saved, starts,
        du, d_delta, dz, dA, dB, dC, dD, d_bias, *run.sizes, SAVE=kernels.SAVE_STEPS, **run.const,
        **shape,
    )  # fmt: skip
    dB, dC = (t.sum((0, 1)).t() if m.dim() == 2 else t.sum(0) for t, m in ((dB, x.B), (dC, x.C)))
    return [
        du,
        d_delta,
        dA.sum((0, 1)).t(),
        dB,
        dC,
        None if x.D is None else dD.sum((0, 1)),
        None if x.z is None else dz,
        None if x.delta_bias is None else d_bias.sum((0, 1)),
        None if x.initial_state is None else starts[:, -1].transpose(1, 2),
    ]
