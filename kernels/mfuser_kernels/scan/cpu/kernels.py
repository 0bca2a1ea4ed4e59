"""The two CPU kernels as LLVM IR, written for one number of states and one set of options.

The time loop is inside, all N states of W channels stay in registers, and A comes multiplied by
log2(e), so that a decay is one exp2. The forward keeps the state at the start of each chunk only;
the backward recomputes chunk by chunk from there, last chunk first. Tasks are (batch item, range
of lane blocks); no two tasks write to one place, so results do not depend on the threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

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

CHUNK = 64  # steps between kept states; two (64, N, W) float32 buffers of the backward fit L2
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

    def write_row(self, x: Value, name: str, offset: Value) -> None:
        self.v.store(x, self.at(name, self.rows), offset, self.variant.bf16)

    def vector(self, name: str) -> Value:
        """D or bias of the block's channels."""
        return self.v.load(self.at(name, self.channel), const(0))

    def read_A(self) -> dict[int, Value]:
        if self.variant.states > States.UNROLL:
            return {}
        rows = range(self.variant.states)
        return {n: self._load_A(const(n)) for n in rows}

    def _load_A(self, n: Value) -> Value:
        return self.v.load(self.at("A", self.channel), self.b.mul(n, self.table_row))

    def pick_A(self, kept: dict[int, Value], n: Value) -> Value:
        return kept[n.constant] if kept else self._load_A(n)

    def finish(self) -> str:
        self.b.ret_void()
        return str(self.module)


def forward_kernel(variant: Variant, name: str) -> str:
    """LLVM IR of the forward for every lane block of a task."""
    k = Kernel(variant, name, FORWARD_LANES)
    b, v, n_ = k.b, k.v, k.n
    state, y = n_.variable(), n_.scalar()
    with loop(b, const(0), k.chunks) as chunk, loop(b, k.first, k.last) as block:
        k.place(chunk, block)
        A, D, bias = k.read_A(), k.vector("D"), k.vector("bias")
        home = k.at("state", k.tables)
        n_.each(lambda n: n_.set(state, n, v.load(home, b.mul(n, k.table_row))))
        with b.if_then(b.icmp_signed("!=", k.field["saved"], const(0))):
            kept = k.at("saved", k.kept)
            n_.each(lambda n: v.store(n_.get(state, n), kept, b.mul(n, k.table_row)))
        with loop(b, const(0), k.steps) as t:
            row = b.mul(t, k.row)
            u = k.read_row("u", row)
            delta = v.add(k.read_row("delta", row), bias)
            if variant.softplus:
                delta = v.softplus(delta, v.exp_of_minus_abs(delta))
            du = v.mul(delta, u)
            b.store(v.mul(D, u), y)

            def step(n: Value, t=t, A=A, delta=delta, du=du) -> None:
                decay = v.exp2(v.mul(delta, k.pick_A(A, n)), variant.may_grow)
                h = v.fma(decay, n_.get(state, n), v.mul(du, k.read_matrix("B", t, n)))
                n_.set(state, n, h)
                b.store(v.fma(h, k.read_matrix("C", t, n), b.load(y)), y)

            n_.each(step)
            out = b.load(y)
            if variant.gate:
                z = k.read_row("z", row)
                out = v.mul(out, v.mul(z, v.sigmoid(z, v.exp_of_minus_abs(z))))
            k.write_row(out, "out", row)
        n_.each(lambda n: v.store(n_.get(state, n), home, b.mul(n, k.table_row)))
    return k.finish()


def scratch_floats(states: int) -> int:
    """Size of the buffer each thread brings to the backward."""
    return CHUNK * BACKWARD_LANES * (4 * states + 3)


def backward_kernel(variant: Variant, name: str) -> str:
    """LLVM IR of the backward for every lane block of a task.

    With q_t the gradient of h_t, p_t = exp(delta A) h_{t-1} and g_t the gradient of y_t:
    q_t = C_t g_t + exp(delta_{t+1} A) q_{t+1}, dB_t = q_t delta_t u_t, dC_t = g_t h_t,
    du_t = delta_t sum_n(q_t B_t) + D g_t, d delta_t = u_t sum_n(q_t B_t) + sum_n(q_t p_t A),
    dA = sum_t q_t p_t delta_t.
    """
    k = Kernel(variant, name, BACKWARD_LANES)
    b, v, n_ = k.b, k.v, k.n
    vector_bytes = 4 * k.lanes
    step_bytes = variant.states * vector_bytes
    buffers = [const(i * CHUNK * step_bytes) for i in range(5)]
    decay_at, p_at, sum_B, sum_C, per_step = (
        b.gep(k.scratch, [offset]) for offset in buffers
    )
    state, q, y, by_B, by_A = n_.variable(), n_.variable(), *(n_.scalar() for _ in range(3))
    dD, d_bias = n_.scalar(), n_.scalar()
    with loop(b, const(0), k.chunks) as past:
        chunk = b.sub(b.sub(k.chunks, const(1)), past)
        with loop(b, const(0), const(2 * CHUNK * variant.states)) as i:
            v.store(v.c(0.0), sum_B, k.times(i, vector_bytes))  # and sum_C, which follows it
        with loop(b, k.first, k.last) as block:
            k.place(chunk, block)
            A, D, bias = k.read_A(), k.vector("D"), k.vector("bias")
            _recompute(k, state, y, decay_at, p_at, per_step, A, D, bias)
            home = k.at("state", k.tables)
            n_.each(lambda n: n_.set(q, n, v.load(home, b.mul(n, k.table_row))))
            for name_, total in (("dD", dD), ("d_bias", d_bias)):
                b.store(v.load(k.at(name_, k.vectors), const(0)), total)
            with loop(b, const(0), k.steps) as back:
                t = b.sub(b.sub(k.steps, const(1)), back)
                row = b.mul(t, k.row)
                own = k.times(t, 3 * vector_bytes)
                delta, slope, g = (
                    v.load(per_step, b.add(own, const(i * vector_bytes))) for i in range(3)
                )
                u = k.read_row("u", row)
                x = v.mul(delta, u)
                b.store(v.c(0.0), by_B)
                b.store(v.c(0.0), by_A)

                def step(n: Value, t=t, A=A, delta=delta, x=x, g=g) -> None:
                    at = b.add(k.times(t, step_bytes), k.times(n, vector_bytes))
                    B, C = k.read_matrix("B", t, n), k.read_matrix("C", t, n)
                    grad = v.fma(C, g, n_.get(q, n))
                    p = v.load(p_at, at)
                    _accumulate(k, "C", sum_C, at, n, v.fma(x, B, p), g)
                    _accumulate(k, "B", sum_B, at, n, grad, x)
                    b.store(v.fma(grad, B, b.load(by_B)), by_B)
                    grad_p = v.mul(grad, p)
                    b.store(v.fma(grad_p, k.pick_A(A, n), b.load(by_A)), by_A)
                    dA, place = k.at("dA", k.tables), b.mul(n, k.table_row)
                    v.store(v.fma(grad_p, delta, v.load(dA, place)), dA, place)
                    n_.set(q, n, v.mul(grad, v.load(decay_at, at)))

                n_.each(step)
                from_B = b.load(by_B)
                k.write_row(v.fma(delta, from_B, v.mul(D, g)), "du", row)
                from_A = v.mul(b.load(by_A), v.c(LN_2))
                d_delta = v.mul(v.fma(u, from_B, from_A), slope)
                k.write_row(d_delta, "d_delta", row)
                b.store(v.fma(g, u, b.load(dD)), dD)
                b.store(v.add(d_delta, b.load(d_bias)), d_bias)
            n_.each(lambda n: v.store(n_.get(q, n), home, b.mul(n, k.table_row)))
            for name_, total in (("dD", dD), ("d_bias", d_bias)):
                v.store(b.load(total), k.at(name_, k.vectors), const(0))
        k.place(chunk, k.first)
        for name_, sums in (("B", sum_B), ("C", sum_C)):
            if not getattr(variant, f"constant_{name_}"):
                _write_sums(k, f"d{name_}", sums, vector_bytes)
    return k.finish()


def _recompute(
    k: Kernel,
    state: Value,
    y: Value,
    decay_at: Value,
    p_at: Value,
    per_step: Value,
    A: dict[int, Value],
    D: Value,
    bias: Value,
) -> None:
    """Walk one chunk forward, keeping every decay and p, and delta, its slope and g of each step."""
    b, v, n_, variant = k.b, k.v, k.n, k.variant
    vector_bytes = 4 * k.lanes
    kept = k.at("saved", k.kept)
    n_.each(lambda n: n_.set(state, n, v.load(kept, b.mul(n, k.table_row))))
    with loop(b, const(0), k.steps) as t:
        row = b.mul(t, k.row)
        u = k.read_row("u", row)
        delta, slope = v.add(k.read_row("delta", row), bias), v.c(1.0)
        if variant.softplus:
            w = v.exp_of_minus_abs(delta)
            delta, slope = v.softplus(delta, w), v.sigmoid(delta, w)
        x = v.mul(delta, u)
        if variant.gate:
            b.store(v.mul(D, u), y)

        def step(n: Value) -> None:
            at = b.add(k.times(t, k.variant.states * vector_bytes), k.times(n, vector_bytes))
            decay = v.exp2(v.mul(delta, k.pick_A(A, n)), variant.may_grow)
            p = v.mul(decay, n_.get(state, n))
            v.store(decay, decay_at, at)
            v.store(p, p_at, at)
            h = v.fma(x, k.read_matrix("B", t, n), p)
            n_.set(state, n, h)
            if variant.gate:
                b.store(v.fma(h, k.read_matrix("C", t, n), b.load(y)), y)

        n_.each(step)
        g = k.read_row("d_out", row)
        if variant.gate:
            z = k.read_row("z", row)
            s = v.sigmoid(z, v.exp_of_minus_abs(z))
            through = v.fma(z, v.sub(v.c(1.0), s), v.c(1.0))
            k.write_row(v.mul(v.mul(g, b.load(y)), v.mul(s, through)), "dz", row)
            g = v.mul(g, v.mul(z, s))
        own = k.times(t, 3 * vector_bytes)
        for i, kept_value in enumerate((delta, slope, g)):
            v.store(kept_value, per_step, b.add(own, const(i * vector_bytes)))


def _accumulate(
    k: Kernel, name: str, sums: Value, at: Value, n: Value, x: Value, y: Value
) -> None:
    """Add x y to the gradient of B or C: of this step over channels, or of this channel."""
    if getattr(k.variant, f"constant_{name}"):
        sums, at = k.at(f"d{name}", k.tables), k.b.mul(n, k.table_row)
    k.v.store(k.v.fma(x, y, k.v.load(sums, at)), sums, at)


def _write_sums(k: Kernel, name: str, sums: Value, vector_bytes: int) -> None:
    """Sum over lanes, and write this task's share of the gradient, (B, L, G, N) for each part."""
    b, v = k.b, k.v
    to = k.at(name, b.mul(k.part, k.field["partial_stride"]), k.matrix)
    with loop(b, const(0), k.steps) as t, loop(b, const(0), const(k.variant.states)) as n:
        index = b.add(k.times(t, k.variant.states), n)
        total = v.sum_lanes(v.load(sums, k.times(index, vector_bytes)))
        place = b.add(b.mul(t, k.matrix_row), k.times(n, 4))
        b.store(total, v.pointer(to, place, F32), align=4)
