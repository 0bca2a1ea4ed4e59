"""Lays out the tensors for the CPU kernels and distributes the work among threads."""

from __future__ import annotations

import ctypes
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser_kernels.scan import memory
from mfuser_kernels.scan.cpu import compiler, pool, reverse
from mfuser_kernels.scan.cpu.drive import TASK_SIZE, Job
from mfuser_kernels.scan.cpu.kernels import CHUNK, FIELDS, LANES, Variant
from mfuser_kernels.scan.inputs import LOG2_E, ScanInputs

# Channels of one backward task, whatever the number of threads: each task has its own partial sums
# of dB and dC, and the order in which they are added must not change. With 64 channels, MVFuser's
# 2 x 512 make 16 tasks, with 2.7 MB of partial sums each for dB and dC.
TASK_CHANNELS = 64
TOTAL_TASKS = 8  # tasks that add up the partial sums
# Fewer state updates than this (about 60 us) are not worth a second thread.
ALONE = 1 << 18
# Floats between the scratch buffers of two threads. Processors prefetch lines beyond those read and
# took them from the other thread: the backward with two threads took 1.1 to 1.5 times as long.
APART = 4096
AT_ONCE = 1 << 28  # state updates between checks for an interrupt, 0.1 s of one thread


def padded(x: ScanInputs) -> tuple[int, int]:
    """Channels of one group and of all groups, padded to whole lane blocks."""
    share = -(-(x.width // x.groups) // LANES) * LANES
    return share, share * x.groups


def saved_shape(x: ScanInputs) -> tuple[int, ...]:
    """States at the start of each chunk."""
    return (x.batch, -(-x.length // CHUNK), x.states, padded(x)[1])


class Layout:
    """One scan's tensors, made contiguous and padded, and the table of their addresses."""

    def __init__(self, x: ScanInputs) -> None:
        self.x = x
        self.share, self.width = padded(x)
        self.fill = self.share - x.width // x.groups
        rows = [t.dtype for t in (x.u, x.delta, x.z) if t is not None]
        # The kernels have one dtype for all rows: the one in which none of them is rounded.
        self.dtype = torch.bfloat16 if set(rows) == {torch.bfloat16} else torch.float32
        self.variant = Variant(
            states=x.states,
            bf16=self.dtype == torch.bfloat16,
            softplus=x.delta_softplus,
            gate=x.z is not None,
            constant_B=x.B.dim() == 2,
            constant_C=x.C.dim() == 2,
            may_grow=not x.delta_softplus or bool((x.A > 0).any()),
        )
        self.fields: dict[str, int] = {
            "length": x.length,
            "width": self.width,
            "groups": x.groups,
            "group_width": self.share,
        }
        self.held: list[Tensor] = []
        self.hold(u=self.rows(x.u), delta=self.rows(x.delta))
        self.hold(A=self.table(x.A.double() * LOG2_E), B=self.matrix(x.B), C=self.matrix(x.C))
        self.hold(D=self.weights(x.D), bias=self.weights(x.delta_bias))
        if x.z is not None:
            self.hold(z=self.rows(x.z))

    def hold(self, **tensors: Tensor) -> None:
        """Enter tensors into the table and keep them alive."""
        for name, t in tensors.items():
            assert t.is_contiguous()
            self.fields[name] = t.data_ptr()
            self.held.append(t)

    def channels(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., D) to (..., Dp)."""
        t = t.to(dtype)
        if self.fill:
            t = F.pad(t.unflatten(-1, (self.x.groups, -1)), (0, self.fill)).flatten(-2)
        return t.contiguous()

    def weights(self, t: Tensor | None) -> Tensor:
        """(D,) to (Dp,), zeros if not given."""
        return torch.zeros(self.width) if t is None else self.channels(t)

    def rows(self, t: Tensor) -> Tensor:
        return self.channels(t, self.dtype)

    def table(self, t: Tensor) -> Tensor:
        """(..., D, N) to (..., N, Dp)."""
        return self.channels(t.transpose(-1, -2))

    def matrix(self, m: Tensor) -> Tensor:
        return self.table(m) if m.dim() == 2 else m.float().contiguous()

    def strip(self, t: Tensor) -> Tensor:
        """(..., Dp) to (..., D)."""
        if not self.fill:
            return t
        by_group: Tensor = t.unflatten(-1, (self.x.groups, self.share))
        return by_group[..., : self.share - self.fill].flatten(-2)

    def untable(self, t: Tensor) -> Tensor:
        """(..., N, Dp) to (..., D, N)."""
        return self.strip(t).transpose(-1, -2).contiguous()

    def empty_rows(self) -> Tensor:
        return memory.empty((self.x.batch, self.x.length, self.width), self.dtype)

    def totals(self, *of_item: int) -> Tensor:
        """Sums over time, zero at first."""
        return torch.zeros((self.x.batch, *of_item), dtype=torch.float64)

    def states(self, t: Tensor | None) -> Tensor:
        """A copy of (B, D, N) as a table (B, N, Dp), zeros if not given."""
        if t is None:
            return torch.zeros((self.x.batch, self.x.states, self.width))
        made = self.table(t)
        return made.clone() if made.data_ptr() == t.data_ptr() else made

    def run(self, direction: str, tasks: list[tuple[int, int, int, int]], scratch: int = 0) -> None:
        """Run tasks (batch item, first and last block, partial sum), with scratch per thread."""
        updates = self.x.batch * self.x.length * self.width * self.x.states
        threads = 1 if updates < ALONE else torch.get_num_threads()
        numbers = itertools.chain.from_iterable(tasks)
        table = (ctypes.c_int64 * len(FIELDS))(*(self.fields.get(name, 0) for name in FIELDS))
        queue = (ctypes.c_int64 * (TASK_SIZE * len(tasks)))(*numbers)
        each = scratch + APART if scratch else 0
        buffer = memory.empty((threads * each,))
        job = Job(
            fields=ctypes.addressof(table),
            tasks=ctypes.addressof(queue),
            scratch=buffer.data_ptr(),
            scratch_bytes=4 * each,
        )
        at_once = max(threads, len(tasks) * AT_ONCE // max(updates, 1))
        pool.run(compiler.function(direction, self.variant), job, len(tasks), threads, at_once)


def forward(x: ScanInputs, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    lay = Layout(x)
    out = lay.empty_rows()
    state = lay.states(x.initial_state)
    saved = memory.empty(saved_shape(x) if training else (0,))
    lay.hold(out=out, state=state)
    if training:
        lay.hold(saved=saved)
    blocks = lay.width // LANES
    # Neighboring blocks share B and C in the cache, but there should be a few tasks per thread.
    step = max(1, min(2, blocks * x.batch // (4 * torch.get_num_threads())))
    tasks = [
        (item, first, min(first + step, blocks), 0)
        for item in range(x.batch)
        for first in range(0, blocks, step)
    ]
    lay.run("forward", tasks)
    return lay.strip(out).to(x.u.dtype).contiguous(), lay.untable(state), saved


def matrix_sums(lay: Layout) -> dict[str, Tensor]:
    """Buffers for the gradients of B and C: (N, Dp) per batch item, or (B, L, G, N padded).

    The second kind is a sum over channels: each task writes its share, `add_shares` adds them up.
    """
    x, sums = lay.x, {}
    for name, m in (("B", x.B), ("C", x.C)):
        if m.dim() == 2:
            sums[name] = lay.totals(x.states, lay.width)
            lay.hold(**{f"d{name}": sums[name]})
        else:
            rows = (*m.shape[:3], reverse.padded_states(x.states))
            parts = -(-lay.share // TASK_CHANNELS)
            shares, sums[name] = memory.empty((parts, *rows)), memory.empty(rows)
            lay.hold(**{f"d{name}": shares, f"total_{name}": sums[name]})
            lay.fields |= {"parts": parts, "partial_stride": shares.stride(0) * 4}
    return sums


def add_shares(lay: Layout, sums: dict[str, Tensor]) -> None:
    """Fill in the gradients that are sums over channels; if both are, they have the same size."""
    sizes = [t.numel() for name, t in sums.items() if f"total_{name}" in lay.fields]
    if sizes:
        vectors = sizes[0] // reverse.GROUP
        bounds = [vectors * i // TOTAL_TASKS for i in range(TOTAL_TASKS + 1)]
        lay.run("total", [(0, *pair, 0) for pair in itertools.pairwise(bounds)])


def backward(
    x: ScanInputs, d_out: Tensor | None, d_last_state: Tensor | None, saved: Tensor
) -> list[Tensor | None]:
    lay = Layout(x)
    lay.hold(d_out=lay.rows(torch.zeros_like(x.u) if d_out is None else d_out))
    q = lay.states(d_last_state)
    du, d_delta = lay.empty_rows(), lay.empty_rows()
    dA = lay.totals(x.states, lay.width)
    dD, d_bias = lay.totals(lay.width), lay.totals(lay.width)
    lay.hold(saved=saved.contiguous(), state=q, du=du, d_delta=d_delta)
    lay.hold(dA=dA, dD=dD, d_bias=d_bias)
    dz = None
    if x.z is not None:
        dz = lay.empty_rows()
        lay.hold(dz=dz)
    sums = matrix_sums(lay)
    per_group, per_task = lay.share // LANES, TASK_CHANNELS // LANES
    tasks = [
        (item, base + first, base + min(first + per_task, per_group), part)
        for item in range(x.batch)
        for base in range(0, per_group * x.groups, per_group)
        for part, first in enumerate(range(0, per_group, per_task))
    ]
    lay.run("backward", tasks, reverse.scratch_floats())
    add_shares(lay, sums)
    dB, dC = (
        lay.untable(sums[name].sum(0)) if m.dim() == 2 else sums[name][..., : x.states]
        for name, m in (("B", x.B), ("C", x.C))
    )
    return [
        lay.strip(du),
        lay.strip(d_delta),
        lay.untable(dA.sum(0)),
        dB,
        dC,
        None if x.D is None else lay.strip(dD.sum(0)),
        None if dz is None else lay.strip(dz),
        None if x.delta_bias is None else lay.strip(d_bias.sum(0)),
        None if x.initial_state is None else lay.untable(q),
    ]
