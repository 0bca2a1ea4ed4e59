"""The two CPU kernels as LLVM IR, written for one number of states and one set of options.

The time loop is inside, all N states of W channels stay in registers, and A comes multiplied by
log2(e), so that a decay is one exp2. The forward keeps the state at the start of each chunk only;
the backward recomputes chunk by chunk from there, last chunk first. Tasks are (batch item, range
of lane blocks); no two tasks write to one place, so results do not depend on the threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llvmlite import ir

from mfuser_kernels.scan.cpu.vector import (
    I64,
    LN_2,
    PTR,
    States,
    Value,
    Vector,
    const,
    loop,
)

CHUNK = 64  # steps between kept states; two (64, N, W) float32 buffers of the backward fit L2
AHEAD, CACHE_LINE = 8, 64  # steps, about a microsecond, ten times a memory access; bytes
FORWARD_LANES, BACKWARD_LANES = 32, 16  # the backward holds twice as many vectors

# Fields of the table that describes one scan to a kernel: addresses, then sizes. Shapes:
# rows (B, L, Dp) of u, delta, z, out and their gradients; A, kept and summed tables (..., N, Dp)
# float32; B and C (B, L, G, N), or (N, Dp) if constant, float32; Dp is D padded to whole blocks.
FIELDS = (
    "u", "delta", "z", "out", "A", "B", "C", "D", "bias", "state", "saved",
    "d_out", "du", "d_delta", "dz", "dA", "dB", "dC", "dD", "d_bias",
    "length", "width", "groups", "group_width", "partial_stride",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

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
        self.module = ir.Module(name)
        kind = ir.FunctionType(ir.VoidType(), [PTR, I64, I64, I64, I64, PTR])
        self.function = ir.Function(self.module, kind, name)
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

    def read_matrix(self, name: str, step: Value, n: Value) -> Value:
        """B or C of one state at one step, in every lane or for each lane."""
        if getattr(self.variant, f"constant_{name}"):
            return self.v.load(self.at(name, self.channel), self.b.mul(n, self.table_row))
        offset = self.b.add(self.b.mul(step, self.matrix_row), self.times(n, 4))
        return self.v.broadcast(self.at(name, self.matrix), offset)

    def read_row(self, name: str, offset: Value) -> Value:
        return self.v.load(self.at(name, self.rows), offset, self.variant.bf16)

    def fetch_ahead(self, names: Iterable[str], row: Value) -> None:
        """Prefetch the rows of some steps later.

        A row lies 4 D bytes after the one before, beyond the reach of the processor's own
        prefetcher: without this, L = 65,536 took twice as long for each token as L = 2,594.
        """
        later = self.b.add(row, self.times(self.row, AHEAD))
        for name in names:
            if name != "z" or self.variant.gate:
                for line in range(0, self.lanes * self.itemsize, CACHE_LINE):
                    self.v.prefetch(self.at(name, self.rows), self.b.add(later, const(line)))

    def write_row(self, x: Value, name: str, offset: Value) -> None:
        self.v.store(x, self.at(name, self.rows), offset, self.variant.bf16)

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
        return str(self.module)


def forward_kernel(variant: Variant, name: str) -> str:
    """LLVM IR of the forward for every lane block of a task."""
    k = Kernel(variant, name, FORWARD_LANES)
    b, v, n_ = k.b, k.v, k.n
    state, A, y = n_.variable(), n_.variable(), n_.scalar()
    with loop(b, const(0), k.chunks) as chunk, loop(b, k.first, k.last) as block:
        k.place(chunk, block)
        D, bias = k.vector("D"), k.vector("bias")
        k.read_tables(state=state, A=A)
        with b.if_then(b.icmp_signed("!=", k.field["saved"], const(0))):
            n_.write(state, k.at("saved", k.kept), k.table_row)
        with loop(b, const(0), k.steps) as t:
            row = b.mul(t, k.row)
            k.fetch_ahead(("u", "delta", "z"), row)
            u = k.read_row("u", row)
            delta = v.add(k.read_row("delta", row), bias)
            if variant.softplus:
                delta = v.softplus(delta, v.exp_of_minus_abs(delta))
            du = v.mul(delta, u)
            b.store(v.mul(D, u), y)

            def step(n: Value, t: Value = t, delta: Value = delta, du: Value = du) -> None:
                decay = v.exp2(v.mul(delta, n_.get(A, n)), variant.may_grow)
                h = v.fma(decay, n_.get(state, n), v.mul(du, k.read_matrix("B", t, n)))
                n_.set(state, n, h)
                b.store(v.fma(h, k.read_matrix("C", t, n), b.load(y)), y)

            n_.each(step)
            out = b.load(y)
            if variant.gate:
                z = k.read_row("z", row)
                out = v.mul(out, v.mul(z, v.sigmoid(z, v.exp_of_minus_abs(z))))
            k.write_row(out, "out", row)
        k.write_tables(state=state)
    return k.finish()


def scratch_floats(states: int) -> int:
    """Size of the buffer each thread brings to the backward."""
    return CHUNK * BACKWARD_LANES * (2 * states + 3)


def padded_states(states: int) -> int:
    """Width of the rows in which the backward writes dB and dC: whole vectors."""
    return -(-states // BACKWARD_LANES) * BACKWARD_LANES


def backward_kernel(variant: Variant, name: str) -> str:
    """LLVM IR of the backward for every lane block of a task.

    With q_t the gradient of h_t, p_t = exp(delta A) h_{t-1} and g_t the gradient of y_t:
    q_t = C_t g_t + exp(delta_{t+1} A) q_{t+1}, dB_t = q_t delta_t u_t, dC_t = g_t h_t,
    du_t = delta_t sum_n(q_t B_t) + D g_t, d delta_t = u_t sum_n(q_t B_t) + sum_n(q_t p_t A),
    dA = sum_t q_t p_t delta_t.
    """
    k = Backward(variant, name, BACKWARD_LANES)
    b = k.b
    with loop(b, const(0), k.chunks) as past:
        chunk = b.sub(b.sub(k.chunks, const(1)), past)
        with loop(b, k.first, k.last) as block:
            k.place(chunk, block)
            k.matrix_sum = b.mul(k.matrix, const(padded_states(variant.states)))
            k.matrix_sum = b.sdiv(k.matrix_sum, const(variant.states))
            k.is_first = b.icmp_signed("==", block, k.first)
            k.D, k.bias = k.vector("D"), k.vector("bias")
            k.read_tables(A=k.A)
            k.recompute()
            k.read_tables(**k.running)
            for name_, total in k.totals.items():
                b.store(k.v.load(k.at(name_, k.vectors), const(0)), total)
            with loop(b, const(0), k.steps) as back:
                k.step_back(b.sub(b.sub(k.steps, const(1)), back))
            k.write_tables(**k.running)
            for name_, total in k.totals.items():
                k.v.store(b.load(total), k.at(name_, k.vectors), const(0))
    return k.finish()


class Backward(Kernel):
    """The two walks of the backward through one lane block of one chunk."""

    D: Value
    bias: Value
    matrix_sum: Value
    is_first: Value

    def __init__(self, variant: Variant, name: str, lanes: int) -> None:
        super().__init__(variant, name, lanes)
        self.bytes = 4 * lanes  # of one vector
        records = CHUNK * variant.states * 2 * self.bytes
        # A record of decay and p for each step and state, one of delta, slope, g for each step.
        self.per_step = self.b.gep(self.scratch, [const(records)])
        self.A, self.h = self.n.variable(), self.n.variable()
        self.running = {"state": self.n.variable(), "dA": self.n.variable()}
        for m in ("B", "C"):
            if getattr(variant, f"constant_{m}"):
                self.running[f"d{m}"] = self.n.variable()
        self.totals = {"dD": self.n.scalar(), "d_bias": self.n.scalar()}
        self.y, self.by_A, self.by_B = (self.n.scalar() for _ in range(3))

    def record(self, t: Value, n: Value) -> Value:
        index = self.b.add(self.times(t, self.variant.states), n)
        return self.times(index, 2 * self.bytes)

    def recompute(self) -> None:
        """Walk forward from the kept state, and write the records."""
        b, v, n_, variant = self.b, self.v, self.n, self.variant
        n_.read(self.h, self.at("saved", self.kept), self.table_row)
        with loop(b, const(0), self.steps) as t:
            row = b.mul(t, self.row)
            self.fetch_ahead(("u", "delta", "z", "d_out"), row)
            u = self.read_row("u", row)
            delta, slope = v.add(self.read_row("delta", row), self.bias), v.c(1.0)
            if variant.softplus:
                w = v.exp_of_minus_abs(delta)
                delta, slope = v.softplus(delta, w), v.sigmoid(delta, w)
            du = v.mul(delta, u)
            if variant.gate:
                b.store(v.mul(self.D, u), self.y)

            def step(n: Value) -> None:
                record = self.record(t, n)
                decay = v.exp2(v.mul(delta, n_.get(self.A, n)), variant.may_grow)
                p = v.mul(decay, n_.get(self.h, n))
                v.store(decay, self.scratch, record)
                v.store(p, self.scratch, b.add(record, const(self.bytes)))
                h = v.fma(du, self.read_matrix("B", t, n), p)
                n_.set(self.h, n, h)
                if variant.gate:
                    b.store(v.fma(h, self.read_matrix("C", t, n), b.load(self.y)), self.y)

            n_.each(step)
            g = self.read_row("d_out", row)
            if variant.gate:
                z = self.read_row("z", row)
                s = v.sigmoid(z, v.exp_of_minus_abs(z))
                through = v.mul(s, v.fma(z, v.sub(v.c(1.0), s), v.c(1.0)))
                self.write_row(v.mul(v.mul(g, b.load(self.y)), through), "dz", row)
                g = v.mul(g, v.mul(z, s))
            for i, x in enumerate((delta, slope, g)):
                v.store(x, self.per_step, self.times(b.add(self.times(t, 3), const(i)), self.bytes))

    def step_back(self, t: Value) -> None:
        """One step of the reverse recurrence."""
        b, v, n_ = self.b, self.v, self.n
        row = b.mul(t, self.row)
        delta, slope, g = (
            v.load(self.per_step, self.times(b.add(self.times(t, 3), const(i)), self.bytes))
            for i in range(3)
        )
        u = self.read_row("u", row)
        du = v.mul(delta, u)
        b.store(v.c(0.0), self.by_B)
        b.store(v.c(0.0), self.by_A)

        def group(states: list[Value]) -> None:
            dB, dC = [], []
            for n in states:
                record = self.record(t, n)
                B, C = self.read_matrix("B", t, n), self.read_matrix("C", t, n)
                q = v.fma(C, g, n_.get(self.running["state"], n))
                p = v.load(self.scratch, b.add(record, const(self.bytes)))
                dB.append(v.mul(q, du))
                dC.append(v.mul(v.fma(du, B, p), g))
                b.store(v.fma(q, B, b.load(self.by_B)), self.by_B)
                qp = v.mul(q, p)
                b.store(v.fma(qp, n_.get(self.A, n), b.load(self.by_A)), self.by_A)
                dA = self.running["dA"]
                n_.set(dA, n, v.fma(qp, delta, n_.get(dA, n)))
                n_.set(self.running["state"], n, v.mul(q, v.load(self.scratch, record)))
            for name, grads in (("B", dB), ("C", dC)):
                self.matrix_grad(name, t, states, grads)

        n_.groups(group)
        by_B = b.load(self.by_B)
        self.write_row(v.fma(delta, by_B, v.mul(self.D, g)), "du", row)
        d_delta = v.mul(v.fma(u, by_B, v.mul(b.load(self.by_A), v.c(LN_2))), slope)
        self.write_row(d_delta, "d_delta", row)
        for x, name in ((v.mul(g, u), "dD"), (d_delta, "d_bias")):
            total = self.totals[name]
            b.store(v.add(x, b.load(total)), total)

    def matrix_grad(self, name: str, t: Value, states: list[Value], grads: list[Value]) -> None:
        """Add to the gradient of B or C: of each channel, or summed over this task's channels."""
        b, v = self.b, self.v
        if getattr(self.variant, f"constant_{name}"):
            total = self.running[f"d{name}"]
            for n, grad in zip(states, grads, strict=True):
                self.n.set(total, n, v.add(grad, self.n.get(total, n)))
            return
        part = b.mul(self.part, self.field["partial_stride"])
        place = self.at(f"d{name}", part, self.matrix_sum)
        row = b.mul(self.field["groups"], const(4 * padded_states(self.variant.states)))
        offset = b.add(b.mul(t, row), self.times(states[0], 4))
        before = b.select(self.is_first, v.c(0.0), v.load(place, offset))
        v.store(v.add(v.sum_each(grads), before), place, offset)
