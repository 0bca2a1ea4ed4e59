"""The backward of the CPU scan as LLVM IR: recompute a chunk, then walk through it backwards.

It handles eight states at a time, so that on a processor with 32 vector registers their h, A, q and
dA stay in registers during the time loops; in memory, each would cost one store per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mfuser_kernels.scan.cpu.kernels import CHUNK, LANES, Kernel, Variant
from mfuser_kernels.scan.cpu.vector import LN_2, States, Value, Vector, const, loop

GROUP = 8  # states
# Vectors kept for each step of a chunk, beside decay and h of each state of a group.
STEP_FIELDS = ("delta", "slope", "g", "du", "sum_A", "sum_B", "y")


def scratch_floats() -> int:
    """Size of each thread's scratch buffer, which should fit in half an L2 cache."""
    return LANES * ((CHUNK + 1) * 2 * GROUP + CHUNK * len(STEP_FIELDS))


def padded_states(states: int) -> int:
    """Width of the rows in which dB and dC are written: whole groups."""
    return -(-states // GROUP) * GROUP


def backward_kernel(variant: Variant, name: str) -> str:
    """LLVM IR of the backward for every lane block of a task.

    With q_t the gradient of h_t, r_t = exp(delta_t A) q_t and g_t the gradient of y_t:
    q_t = C_t g_t + r_{t+1}, dB_t = q_t delta_t u_t, dC_t = g_t h_t,
    du_t = delta_t sum_n(q_t B_t) + D g_t,
    d delta_t = u_t sum_n(q_t B_t) + sum_n(r_t h_{t-1} A), dA = sum_t r_t h_{t-1} delta_t.
    Sums over time are float32 within a chunk and float64 over chunks: their terms have both signs.
    """
    k = Backward(variant, name)
    b = k.b
    full, rest = divmod(variant.states, GROUP)
    with loop(b, const(0), k.chunks) as past:
        chunk = b.sub(b.sub(k.chunks, const(1)), past)
        with loop(b, k.first, k.last) as block:
            k.place(chunk, block)
            k.prepare(block)
            if full:
                with loop(b, const(0), const(full)) as group:
                    k.walk(StateGroup(k, b.mul(group, const(GROUP)), GROUP))
            if rest:
                k.walk(StateGroup(k, const(full * GROUP), rest))
            k.finish_steps()
    return k.finish()


def total_kernel(variant: Variant, name: str) -> str:
    """LLVM IR that adds up the tasks' shares of dB and dC, first to last of their vectors.

    torch.sum would work, but wakes OpenMP's threads, which then spin for milliseconds on the
    processors that the next call needs.
    """
    k = Kernel(variant, name, GROUP)
    b, v = k.b, k.v
    for m in "BC":
        if k.is_constant(m):
            continue
        with loop(b, k.first, k.last) as i:
            place = k.times(i, 4 * GROUP)
            total = k.n.scalar()
            b.store(v.load(k.at(f"d{m}"), place), total)
            with loop(b, const(1), k.field["parts"]) as part:
                share = k.at(f"d{m}", b.mul(part, k.field["partial_stride"]))
                b.store(v.add(b.load(total), v.load(share, place)), total)
            v.store(b.load(total), k.at(f"total_{m}"), place)
    return k.finish()


class StateGroup:
    """Neighboring states: index of the first (a value), and how many (a number)."""

    def __init__(self, k: Kernel, first: Value, count: int) -> None:
        self.k, self.first = k, first
        self.states = States(k.v, count)
        self.numbers = range(count)

    def read(self, name: str, place: Value) -> Value:
        """A variable filled from the table of that name, at a byte offset."""
        variable = self.states.variable()
        skip = self.k.b.mul(self.first, self.k.table_row)
        self.states.read(variable, self.k.at(name, place, skip), self.k.table_row)
        return variable

    def write(self, variable: Value, name: str, place: Value) -> None:
        skip = self.k.b.mul(self.first, self.k.table_row)
        self.states.write(variable, self.k.at(name, place, skip), self.k.table_row)

    @contextmanager
    def chunk_sum(self, name: str, place: Value) -> Iterator[Value]:
        """A variable, zero at first, that is added to the float64 table of that name at the end."""
        variable, b, v = self.states.variable(), self.k.b, self.k.v
        for n in self.numbers:
            self.set(variable, n, v.c(0.0))
        yield variable
        wide_place, wide_row = self.k.times(place, 2), self.k.times(self.k.table_row, 2)
        for n in self.numbers:
            offset = b.mul(b.add(self.first, const(n)), wide_row)
            v.add_to(self.k.at(name, wide_place), offset, self.get(variable, n))

    def get(self, variable: Value, n: int) -> Value:
        return self.states.get(variable, const(n))

    def set(self, variable: Value, n: int, x: Value) -> None:
        self.states.set(variable, const(n), x)

    def matrix(self, name: str, t: Value, n: int) -> Value:
        return self.k.read_matrix(name, t, self.k.b.add(self.first, const(n)))


class Backward(Kernel):
    """The walks through one lane block of one chunk."""

    matrix_sum: Value
    is_first: Value
    to_next: Value
    D: Value

    def __init__(self, variant: Variant, name: str) -> None:
        super().__init__(variant, name, LANES)
        self.bytes = 4 * LANES  # of one vector
        self.per_step = self.b.gep(self.scratch, [const((CHUNK + 1) * 2 * GROUP * self.bytes)])

    def step_field(self, name: str, t: Value) -> tuple[Value, Value]:
        index = self.b.add(self.times(t, len(STEP_FIELDS)), const(STEP_FIELDS.index(name)))
        return self.per_step, self.times(index, self.bytes)

    def recall(self, name: str, t: Value) -> Value:
        return self.v.load(*self.step_field(name, t))

    def keep(self, t: Value, **values: Value) -> None:
        for name, x in values.items():
            self.v.store(x, *self.step_field(name, t))

    def kept_decay(self, t: Value, n: int) -> tuple[Value, Value]:
        """The address of exp(delta_t A) of one state of the group; 1 past the last step."""
        index = self.b.add(self.times(t, GROUP), const(n))
        return self.scratch, self.times(index, 2 * self.bytes)

    def start_state(self, t: Value, n: int) -> tuple[Value, Value]:
        """The address of h_{t-1}, also for t one past the last step."""
        base, offset = self.kept_decay(t, n)
        return base, self.b.add(offset, const(self.bytes))

    def prepare(self, block: Value) -> None:
        """Compute what each step needs for all its states."""
        b, v, variant = self.b, self.v, self.variant
        # The next lane block of these rows, or the first one of the chunk before.
        size = LANES * self.itemsize
        back = b.add(self.times(self.row, CHUNK), self.times(b.sub(block, self.first), size))
        is_last = b.icmp_signed("==", b.add(block, const(1)), self.last)
        self.to_next = b.select(is_last, b.neg(back), const(size))
        self.matrix_sum = b.mul(self.matrix, const(padded_states(variant.states)))
        self.matrix_sum = b.sdiv(self.matrix_sum, const(variant.states))
        self.is_first = b.icmp_signed("==", block, self.first)
        self.D, bias = self.vector("D"), self.vector("bias")
        with loop(b, const(0), self.steps) as t:
            row = b.mul(t, self.row)
            u, g = self.read_row("u", row), self.read_row("d_out", row)
            delta, slope = v.add(self.read_row("delta", row), bias), v.c(1.0)
            if variant.softplus:
                w = v.exp_of_minus_abs(delta)
                delta, slope = v.softplus_and_slope(delta, w)
            if variant.gate:
                z = self.read_row("z", row)
                g = v.mul(g, v.mul(z, v.sigmoid(z, v.exp_of_minus_abs(z))))
                self.keep(t, y=v.mul(self.D, u))
            zero = v.c(0.0)
            self.keep(t, delta=delta, slope=slope, g=g, du=v.mul(delta, u), sum_A=zero, sum_B=zero)

    def walk(self, group: StateGroup) -> None:
        """Forward through the chunk, then back, for the states of a group."""
        A, h = group.read("A", self.channel), group.read("saved", self.kept)
        with loop(self.b, const(0), self.steps) as t:
            self.step(t, group, A, h)
        for n in group.numbers:
            self.v.store(group.get(h, n), *self.start_state(self.steps, n))
            self.v.store(self.v.c(1.0), *self.kept_decay(self.steps, n))
        q = group.read("state", self.tables)
        with ExitStack() as stack:
            grads = {
                m: stack.enter_context(group.chunk_sum(f"d{m}", self.tables))
                for m in ("A", "B", "C")
                if m == "A" or self.is_constant(m)
            }
            back = stack.enter_context(loop(self.b, const(0), self.steps))
            t = self.b.sub(self.b.sub(self.steps, const(1)), back)
            self.step_back(t, group, A, q, grads)
        for n in group.numbers:
            group.set(q, n, self.v.mul(group.get(q, n), self.v.load(*self.kept_decay(const(0), n))))
        group.write(q, "state", self.tables)

    def step(self, t: Value, group: StateGroup, A: Value, h: Value) -> None:
        """Recompute one step and keep what the walk back needs."""
        b, v = self.b, self.v
        self.fetch(("u", "delta", "z", "d_out"), b.add(b.mul(t, self.row), self.to_next))
        delta, du = self.recall("delta", t), self.recall("du", t)
        y = self.recall("y", t) if self.variant.gate else None
        for n in group.numbers:
            decay = self.decay(t, delta, group.get(A, n))
            before = group.get(h, n)
            v.store(decay, *self.kept_decay(t, n))
            v.store(before, *self.start_state(t, n))
            after = v.fma(decay, before, v.mul(du, group.matrix("B", t, n)))
            group.set(h, n, after)
            if y is not None:
                y = v.fma(after, group.matrix("C", t, n), y)
        if y is not None:
            self.keep(t, y=y)

    def step_back(
        self, t: Value, group: StateGroup, A: Value, later: Value, grads: dict[str, Value]
    ) -> None:
        """One step of the reverse recurrence; `later` has q of the step after, then of this one.

        dC is summed here, although h_t was known on the walk forward: there the exponentials keep
        all vector units of the processor busy, here the multiply-adds keep half of them busy.
        """
        b, v = self.b, self.v
        delta, g, du, sum_A, sum_B = (
            self.recall(name, t) for name in ("delta", "g", "du", "sum_A", "sum_B")
        )
        self.fetch(("du", "d_delta"), b.mul(t, self.row), write=True)
        after, of_B, of_C = b.add(t, const(1)), [], []
        for n in group.numbers:
            decay, before = v.load(*self.kept_decay(t, n)), v.load(*self.start_state(t, n))
            of_C.append(v.mul(v.load(*self.start_state(after, n)), g))
            from_y = v.mul(group.matrix("C", t, n), g)
            q = v.fma(v.load(*self.kept_decay(after, n)), group.get(later, n), from_y)
            group.set(later, n, q)
            of_B.append(v.mul(q, du))
            sum_B = v.fma(q, group.matrix("B", t, n), sum_B)
            exponent = v.mul(v.mul(q, decay), before)  # gradient of delta A
            sum_A = v.fma(exponent, group.get(A, n), sum_A)
            group.set(grads["A"], n, v.fma(exponent, delta, group.get(grads["A"], n)))
        self.keep(t, sum_A=sum_A, sum_B=sum_B)
        self.matrix_grad("B", t, group, of_B, grads.get("B"))
        self.matrix_grad("C", t, group, of_C, grads.get("C"))

    def finish_steps(self) -> None:
        """Gradients of u, delta, z and of the vectors D and bias, from the sums over states."""
        b, v = self.b, self.v
        totals = {name: self.n.scalar() for name in ("dD", "d_bias")}
        for total in totals.values():
            b.store(v.c(0.0), total)
        with loop(b, const(0), self.steps) as t:
            row = b.mul(t, self.row)
            delta, slope, g, sum_A, sum_B = (
                self.recall(name, t) for name in ("delta", "slope", "g", "sum_A", "sum_B")
            )
            u = self.read_row("u", row)
            self.write_row(v.fma(delta, sum_B, v.mul(self.D, g)), "du", row)
            d_delta = v.mul(v.fma(u, sum_B, v.mul(sum_A, v.c(LN_2))), slope)
            self.write_row(d_delta, "d_delta", row)
            for name, x in (("dD", v.mul(g, u)), ("d_bias", d_delta)):
                b.store(v.add(x, b.load(totals[name])), totals[name])
            if self.variant.gate:
                z = self.read_row("z", row)
                s = v.sigmoid(z, v.exp_of_minus_abs(z))
                slope_z = v.mul(s, v.fma(z, v.sub(v.c(1.0), s), v.c(1.0)))
                dy = v.mul(self.read_row("d_out", row), self.recall("y", t))
                self.write_row(v.mul(dy, slope_z), "dz", row)
        for name, total in totals.items():
            v.add_to(self.at(name, self.times(self.vectors, 2)), const(0), b.load(total))

    def matrix_grad(
        self, name: str, t: Value, group: StateGroup, grads: list[Value], running: Value | None
    ) -> None:
        """Add to the gradient of B or C: of each channel, or summed over this task's channels."""
        b, v = self.b, self.v
        if running is not None:
            for n, grad in enumerate(grads):
                group.set(running, n, v.add(grad, group.get(running, n)))
            return
        part = b.mul(self.part, self.field["partial_stride"])
        place = self.at(f"d{name}", part, self.matrix_sum)
        row = b.mul(self.field["groups"], const(4 * padded_states(self.variant.states)))
        offset = b.add(b.mul(t, row), self.times(group.first, 4))
        sums = Vector(b, GROUP)
        before = sums.load_unless(self.is_first, place, offset)
        sums.store(sums.add(v.sum_each(grads), before), place, offset)
