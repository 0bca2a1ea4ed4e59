"""The CPU kernels as LLVM IR, written for one number of states and one set of options.

This module has the forward and what both directions share; the backward is in reverse.py. The time
loop is inside, the states of W channels stay in registers, and A is given multiplied by log2(e), so
that a decay is one exp2. The forward saves the state only at the start of each chunk;
the backward recomputes chunk by chunk from there, last chunk first. Tasks are (batch item, range of
lane blocks); no two tasks write to the same place, so results do not depend on the threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from llvmlite import ir

from mfuser_kernels.scan.cpu.drive import TASK_SIZE, add_driver
from mfuser_kernels.scan.cpu.vector import (
    F32,
    I64,
    LN_2,
    PTR,
    States,
    Value,
    Vector,
    const,
    loop,
)

CHUNK = 64  # steps between saved states
AHEAD, CACHE_LINE = 16, 64  # steps, 0.7 microseconds, several memory accesses; bytes
LANES = 16  # 32 are no faster: their values no longer fit 32 registers
# Fractions of a rounding step between -1/2 and 1/2, spread evenly over every run of steps (the
# index with its bits reversed), and the exponent of 2 that moves a float32 just below 1 by
# one such step.
DITHER = tuple((int(f"{i:010b}"[::-1], 2) + 0.5) / 1024 - 0.5 for i in range(1024))
STEP_BELOW_ONE = 2.0**-24 / LN_2

# Fields of the table that describes one scan to a kernel: addresses, then sizes. Shapes:
# rows (B, L, Dp) of u, delta, z, out and their gradients; tables (..., N, Dp) float32, and float64
# for sums over time; B and C (B, L, G, N), or (N, Dp) if constant, float32; Dp is D padded to whole
# blocks.
FIELDS = (
    "u", "delta", "z", "out", "A", "B", "C", "D", "bias", "state", "saved",
    "d_out", "du", "d_delta", "dz", "dA", "dB", "dC", "dD", "d_bias", "total_B", "total_C",
    "length", "width", "groups", "group_width", "partial_stride", "parts",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """The options that a kernel is compiled for."""

    states: int
    bf16: bool
    softplus: bool
    gate: bool
    constant_B: bool
    constant_C: bool
    may_grow: bool  # exponents above 0 are possible


class Kernel:
    """Parts that both kernels share."""

    def __init__(self, variant: Variant, name: str, lanes: int) -> None:
        self.variant, self.lanes = variant, lanes
        self.module, self.name = ir.Module(name), name
        kind = ir.FunctionType(ir.VoidType(), [PTR, *[I64] * TASK_SIZE, PTR])
        self.function = ir.Function(self.module, kind, "task")
        self.function.linkage = "internal"
        # table, batch item, first and last lane block, index of the partial sum, scratch
        table, self.item, self.first, self.last, self.part, self.scratch = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.v = Vector(self.b, lanes)
        self.n = States(self.v, variant.states)
        self.field = {
            name: self.b.load(self.v.pointer(table, const(8 * i), I64), align=8)
            for i, name in enumerate(FIELDS)
        }
        self.itemsize = 2 if variant.bf16 else 4
        f, b = self.field, self.b
        self.row = b.mul(f["width"], const(self.itemsize))  # bytes from step to step
        self.table_row = b.mul(f["width"], const(4))  # bytes from state to state
        self.matrix_row = b.mul(f["groups"], const(4 * variant.states))
        self.chunks = b.sdiv(b.add(f["length"], const(CHUNK - 1)), const(CHUNK))
        self.table_size = b.mul(self.table_row, const(variant.states))

    def at(self, name: str, *offsets: Value) -> Value:
        """Pointer to a field plus byte offsets."""
        address = self.field[name]
        for offset in offsets:
            address = self.b.add(address, offset)
        return self.b.inttoptr(address, PTR)

    def times(self, x: Value, n: int) -> Value:
        return self.b.mul(x, const(n))

    def place(self, chunk: Value, block: Value) -> None:
        """Byte offsets of one lane block in one chunk."""
        b, f = self.b, self.field
        self.start = self.times(chunk, CHUNK)
        left = b.sub(f["length"], self.start)
        full = b.icmp_signed(">", left, const(CHUNK))
        self.steps = b.select(full, const(CHUNK), left)
        channel = self.times(block, self.lanes)
        self.channel = self.times(channel, 4)
        step = b.add(b.mul(self.item, f["length"]), self.start)
        self.rows = b.add(b.mul(step, self.row), self.times(channel, self.itemsize))
        group = b.sdiv(channel, f["group_width"])
        self.matrix = b.add(
            b.mul(step, self.matrix_row), self.times(group, 4 * self.variant.states)
        )
        kept = b.add(b.mul(self.item, self.chunks), chunk)
        self.kept = b.add(b.mul(kept, self.table_size), self.channel)
        self.tables = b.add(b.mul(self.item, self.table_size), self.channel)
        self.vectors = b.add(b.mul(self.item, self.table_row), self.channel)

    def is_constant(self, name: str) -> bool:
        """Whether matrix B or C is the same at all steps."""
        return bool(getattr(self.variant, f"constant_{name}"))

    def read_matrix(self, name: str, step: Value, n: Value) -> Value:
        """B or C of one state at one step, in every lane or for each lane."""
        if self.is_constant(name):
            return self.v.load(self.at(name, self.channel), self.b.mul(n, self.table_row))
        offset = self.b.add(self.b.mul(step, self.matrix_row), self.times(n, 4))
        return self.v.broadcast(self.at(name, self.matrix), offset)

    def read_row(self, name: str, offset: Value) -> Value:
        return self.v.load(self.at(name, self.rows), offset, self.variant.bf16)

    def fetch_ahead(self, names: Iterable[str], row: Value, write: bool = False) -> None:
        """Prefetch the rows of some steps later.

        A row lies 4 D bytes after the one before, beyond the reach of the processor's own
        prefetcher: without this, a token took twice as long at L = 65,536 as at L = 2,594.
        """
        self.fetch(names, self.b.add(row, self.times(self.row, AHEAD)), write)

    def fetch(self, names: Iterable[str], row: Value, write: bool = False) -> None:
        """Prefetch this block's part of a row, to be read or to be written."""
        for name in names:
            if name != "z" or self.variant.gate:
                for line in range(0, self.lanes * self.itemsize, CACHE_LINE):
                    self.v.prefetch(self.at(name, self.rows), self.b.add(row, const(line)), write)

    def write_row(self, x: Value, name: str, offset: Value) -> None:
        self.v.store(x, self.at(name, self.rows), offset, self.variant.bf16)

    def decay(self, t: Value, delta: Value, A: Value) -> Value:
        """exp(delta A) of a step, with A log2(e) given; right on average over the steps.

        float32 resolves little close to 1: 1 - 1e-8 rounds to 1, and a constant decay is rounded to
        the same side at every step. Over 20,000 steps the error came to 4e-4. Dithering the
        exponent by less than a rounding step, which is free in a multiply-add, reduces it to 4e-6.
        The sum that uses the decay must round once, h = fma(decay, h, ...), or the bias returns. A
        decay of exactly 1 stays 1; above 1 rounding steps are twice as large, and it is too little.
        """
        return self.v.exp2(self.v.fma(delta, A, self.dither(t)), self.variant.may_grow)

    def dither(self, t: Value) -> Value:
        table = self.module.globals.get("dither")
        if table is None:
            kind = ir.ArrayType(F32, len(DITHER))
            table = ir.GlobalVariable(self.module, kind, "dither")
            table.initializer = ir.Constant(kind, [F32(x * STEP_BELOW_ONE) for x in DITHER])
            table.global_constant, table.linkage = True, "internal"
        index = self.b.and_(self.b.add(self.start, t), const(len(DITHER) - 1))
        return self.v.broadcast(self.b.bitcast(table, PTR), self.times(index, 4))

    def vector(self, name: str) -> Value:
        """D or bias of the block's channels."""
        return self.v.load(self.at(name, self.channel), const(0))

    def read_tables(self, **variables: Value) -> None:
        """Variables from the tables of the same names, at this batch item and lane block.

        Rows of a table lie 4 Dp bytes apart, often a power of two, so that 16 of them compete for
        two sets of the L1 cache: used in place, dA alone made the backward 1.3 times as long.
        """
        for name, variable in variables.items():
            place = self.channel if name == "A" else self.tables
            self.n.read(variable, self.at(name, place), self.table_row)

    def write_tables(self, **variables: Value) -> None:
        for name, variable in variables.items():
            self.n.write(variable, self.at(name, self.tables), self.table_row)

    def finish(self) -> str:
        self.b.ret_void()
        add_driver(self.module, self.function, self.name)
        # LLVM aligns the stack to 16 bytes; a spilled vector of 64 could straddle two cache lines.
        # The driver needs it too, since the task may be inlined into it.
        return str(self.module).replace(")\n{", ') "stackrealign"\n{')


def forward_kernel(variant: Variant, name: str) -> str:
    """LLVM IR of the forward for every lane block of a task."""
    k = Kernel(variant, name, LANES)
    b, v, n_ = k.b, k.v, k.n
    state, A = n_.variable(), n_.variable()
    # Two alternating sums over states: with one, each state would wait for the previous state.
    ys = n_.scalar(), n_.scalar()
    turns = itertools.cycle(ys)
    ready = {name: n_.scalar() for name in ("delta", "u", "gate")}

    def prepare(t: Value, bias: Value) -> None:
        """Compute what one step needs for all its states."""
        row = b.mul(t, k.row)
        k.fetch_ahead(("u", "delta", "z"), row)
        k.fetch_ahead(("out",), row, write=True)
        delta = v.add(k.read_row("delta", row), bias)
        if variant.softplus:
            delta = v.softplus(delta, v.exp_of_minus_abs(delta))
        b.store(delta, ready["delta"])
        b.store(k.read_row("u", row), ready["u"])
        if variant.gate:
            z = k.read_row("z", row)
            b.store(v.mul(z, v.sigmoid(z, v.exp_of_minus_abs(z))), ready["gate"])

    with loop(b, const(0), k.chunks) as chunk, loop(b, k.first, k.last) as block:
        k.place(chunk, block)
        D, bias = k.vector("D"), k.vector("bias")
        k.read_tables(state=state, A=A)
        with b.if_then(b.icmp_signed("!=", k.field["saved"], const(0))):
            n_.write(state, k.at("saved", k.kept), k.table_row)
        prepare(const(0), bias)
        last = b.sub(k.steps, const(1))
        with loop(b, const(0), k.steps) as t:
            delta, u = b.load(ready["delta"]), b.load(ready["u"])
            gate = b.load(ready["gate"]) if variant.gate else None
            du = v.mul(delta, u)
            b.store(v.mul(D, u), ys[0])
            b.store(v.c(0.0), ys[1])
            # Prepare the next step now: nothing in this step waits for it, so the latency of
            # softplus overlaps with the work on the states. This saves 10 % of the forward.
            after = b.add(t, const(1))
            prepare(b.select(b.icmp_signed("<", after, last), after, last), bias)

            def step(n: Value, t: Value = t, delta: Value = delta, du: Value = du) -> None:
                decay = k.decay(t, delta, n_.get(A, n))
                h = v.fma(decay, n_.get(state, n), v.mul(du, k.read_matrix("B", t, n)))
                n_.set(state, n, h)
                y = next(turns)
                b.store(v.fma(h, k.read_matrix("C", t, n), b.load(y)), y)

            n_.each(step)
            out = v.add(*(b.load(y) for y in ys))
            if gate is not None:
                out = v.mul(out, gate)
            k.write_row(out, "out", b.mul(t, k.row))
        k.write_tables(state=state)
    return k.finish()
