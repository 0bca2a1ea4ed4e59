"""LLVM vector code for the CPU kernels: W float32 lanes, one lane for each channel.

Vectors wider than the machine's registers are split by LLVM, so the same code serves AVX-512,
AVX2, SSE2 and NEON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float
from functools import cache
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, llvm_version_info

from mfuser_kernels.scan.inputs import LOG2_E

F32, I1, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(n) for n in (1, 8, 16, 32, 64))
PTR = ir.PointerType(I8)
LN_2 = 0.6931471805599453
LOG2_E_FLOAT = c_float(LOG2_E).value  # rounded to float32
# No nnan or ninf: a NaN must reach the output. No reassoc: it folds the magic addition of exp2.
FLAGS = ("contract", "nsz")
# 2^f on [-0.5, 0.5], least maximum error with 2^0 exactly 1 (9.1e-8 relative). Exact at 0, because
# a bias there compounds over every step when delta A is tiny: 1.8e-7 grew to 3.6e-3 in 20,000.
EXP2 = (1.0, 0.6931469775988194, 0.24022242085144316, 0.05550733743746329,
        0.009671512650236193, 0.0013264727048594906)  # fmt: skip
# (2^f - 1) / f on [-1/32, 1/32]: 2^f is then known to 9e-9.
EXP2_SLOPE = (LN_2, 0.2402265069591007, 0.05550410866482158)
# artanh(s) / s as a polynomial in s^2 for s up to 1/3 (4.5e-9 relative).
ARTANH = (1.0, 0.3333320814278829, 0.2001076362145391, 0.14000902610720742, 0.14005993520688045)
GROUP = 16  # states whose code is written out
MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, left in the low bits

Value = Any  # llvmlite has no type hints


@cache
def has_lookup() -> bool:
    """Whether one instruction looks up 16 float32 in a vector."""
    return bool(get_host_cpu_features().get("avx512f"))


def const(n: int) -> Value:
    return ir.Constant(I64, n)


class Vector:
    """Writes float32 vector code with an llvmlite builder."""

    def __init__(self, builder: Value, lanes: int) -> None:
        self.b, self.lanes = builder, lanes
        self.float, self.int = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)

    # constants, arithmetic
    def c(self, x: float) -> Value:
        return ir.Constant(self.float, [F32(x)] * self.lanes)

    def ci(self, x: int) -> Value:
        return ir.Constant(self.int, [I32(x)] * self.lanes)

    def add(self, x: Value, y: Value) -> Value:
        return self.b.fadd(x, y, flags=FLAGS)

    def sub(self, x: Value, y: Value) -> Value:
        return self.b.fsub(x, y, flags=FLAGS)

    def mul(self, x: Value, y: Value) -> Value:
        return self.b.fmul(x, y, flags=FLAGS)

    def div(self, x: Value, y: Value) -> Value:
        return self.b.fdiv(x, y, flags=FLAGS)

    def call(self, name: str, *args: Value) -> Value:
        full = f"llvm.{name}.v{self.lanes}f32"
        function = self.b.module.globals.get(full) or ir.Function(
            self.b.module, ir.FunctionType(self.float, [self.float] * len(args)), full
        )
        return self.b.call(function, args)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        return self.call("fmuladd", x, y, z)

    def at_least(self, x: Value, low: float) -> Value:
        """max(x, low), NaN if x is; the order of the operands makes it one instruction on x86."""
        return self.b.select(self.b.fcmp_ordered("<", x, self.c(low)), self.c(low), x)

    def at_most(self, x: Value, high: float) -> Value:
        return self.b.select(self.b.fcmp_ordered(">", x, self.c(high)), self.c(high), x)

    # memory: addresses are i8 pointers, offsets are in bytes
    def pointer(self, base: Value, offset: Value, kind: Value) -> Value:
        address = self.b.gep(base, [offset])
        return self.b.bitcast(address, ir.PointerType(kind))

    def load(self, base: Value, offset: Value, bf16: bool = False) -> Value:
        if not bf16:
            return self.b.load(self.pointer(base, offset, self.float), align=4)
        half = ir.VectorType(I16, self.lanes)
        bits = self.b.load(self.pointer(base, offset, half), align=2)
        return self.b.bitcast(self.b.shl(self.b.zext(bits, self.int), self.ci(16)), self.float)

    def load_unless(self, skip: Value, base: Value, offset: Value) -> Value:
        """float32 from memory, or zeros without reading it."""
        bits, at = ir.VectorType(I1, self.lanes), self.pointer(base, offset, self.float)
        name = f"llvm.masked.load.v{self.lanes}f32.p0"
        if llvm_version_info < (16,):
            name += f"v{self.lanes}f32"
        kinds = [ir.PointerType(self.float), I32, bits, self.float]
        function = self.b.module.globals.get(name) or ir.Function(
            self.b.module, ir.FunctionType(self.float, kinds), name
        )
        wanted = self.b.select(
            skip, ir.Constant(bits, [I1(0)] * self.lanes), ir.Constant(bits, [I1(1)] * self.lanes)
        )
        return self.b.call(function, [at, I32(4), wanted, self.c(0.0)])

    def store(self, x: Value, base: Value, offset: Value, bf16: bool = False) -> None:
        if not bf16:
            self.b.store(x, self.pointer(base, offset, self.float), align=4)
            return
        bits = self.b.bitcast(x, self.int)
        odd = self.b.and_(self.b.lshr(bits, self.ci(16)), self.ci(1))
        nearest = self.b.lshr(self.b.add(bits, self.b.add(self.ci(0x7FFF), odd)), self.ci(16))
        # Rounding up could carry the mantissa of a NaN over into infinity or zero.
        nearest = self.b.select(self.b.fcmp_unordered("uno", x, x), self.ci(0x7FC0), nearest)
        half = ir.VectorType(I16, self.lanes)
        self.b.store(self.b.trunc(nearest, half), self.pointer(base, offset, half), align=2)

    def add_to(self, base: Value, offset: Value, x: Value) -> None:
        """Add to float64 in memory."""
        wide = ir.VectorType(ir.DoubleType(), self.lanes)
        place = self.pointer(base, offset, wide)
        total = self.b.fadd(self.b.load(place, align=8), self.b.fpext(x, wide))
        self.b.store(total, place, align=8)

    def prefetch(self, base: Value, offset: Value, write: bool) -> None:
        """Request the cache line at an address; one outside the tensor is harmless."""
        name = "llvm.prefetch.p0" if llvm_version_info >= (16,) else "llvm.prefetch.p0i8"
        kinds = [PTR, I32, I32, I32]
        function = self.b.module.globals.get(name) or ir.Function(
            self.b.module, ir.FunctionType(ir.VoidType(), kinds), name
        )
        keep, data = I32(3), I32(1)
        self.b.call(function, [self.b.gep(base, [offset]), I32(int(write)), keep, data])

    def broadcast(self, base: Value, offset: Value) -> Value:
        """One float32 from memory in every lane."""
        x = self.b.load(self.pointer(base, offset, F32), align=4)
        undefined = ir.Constant(self.float, ir.Undefined)
        one = self.b.insert_element(undefined, x, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(self.int, [0] * self.lanes))

    def _add_pairs(self, x: Value, y: Value, size: int) -> Value:
        """Sums of neighboring runs of `size` lanes, those of x before those of y.

        Inside runs of four lanes for size 1, over the whole vector for size 4: both are single
        shuffles on x86, and three such steps and a last half sum 8 vectors with 24 instructions.
        """
        block = 4 if size == 1 else self.lanes
        even = [i for i in range(block) if i // size % 2 == 0]
        odd = [i for i in range(block) if i // size % 2 == 1]
        both = []
        for half in (even, odd):
            indices = [
                start + i + source
                for start in range(0, self.lanes, block)
                for source in (0, self.lanes)
                for i in half
            ]
            mask = ir.Constant(self.int, [I32(i) for i in indices])
            both.append(self.b.shuffle_vector(x, y, mask))
        return self.add(*both)

    def sum_each(self, vectors: list[Value]) -> Value:
        """The sums over lanes of 8 vectors of 16 lanes, as 8 lanes; missing ones give 0."""
        assert self.lanes == 16 and len(vectors) <= 8
        waiting: list[list[Value]] = [[] for _ in range(4)]

        def give(x: Value, level: int) -> None:
            waiting[level].append(x)
            if len(waiting[level]) == 2 and level < 3:
                (x, y), waiting[level] = waiting[level], []
                give(self._add_pairs(x, y, 1 if level < 2 else 4), level + 1)

        for x in vectors:
            give(x, 0)
        for _ in range(len(vectors), 8):
            give(self.c(0.0), 0)
        (runs,) = waiting[3]  # sums of four runs of 4 lanes: x 0-1, x 2-3, y 0-1, y 2-3
        parts = []
        for first in (0, 4):
            lanes = [first + i for i in (0, 1, 2, 3, 8, 9, 10, 11)]
            mask = ir.Constant(ir.VectorType(I32, 8), [I32(i) for i in lanes])
            parts.append(self.b.shuffle_vector(runs, runs, mask))
        return Vector(self.b, 8).add(*parts)

    # functions
    def exp2(self, x: Value, may_grow: bool) -> Value:
        """2^x; below -126 it stays at 2^-126, and above 128 at infinity if `may_grow`."""
        x = self.at_least(x, -126.0)
        if may_grow:
            x = self.at_most(x, 128.0)
        steps = self.exponent_steps(may_grow)
        near, bits = self.nearest(x, steps)
        return self.power(bits, self.b.fsub(x, near), steps)

    def exp_of_minus_abs(self, x: Value) -> Value:
        """e^-|x|, with log2(e) in two parts: rounding a large product would lose too much."""
        x = self.at_least(self.b.fneg(self.call("fabs", x)), -126.0 / LOG2_E)
        steps = self.exponent_steps(may_grow=False)
        near, bits = self.nearest(self.mul(x, self.c(LOG2_E)), steps)
        f = self.fma(x, self.c(LOG2_E_FLOAT), self.b.fneg(near))
        return self.power(bits, self.fma(x, self.c(LOG2_E - LOG2_E_FLOAT), f), steps)

    def exponent_steps(self, may_grow: bool) -> int:
        """How finely exponents are rounded: to sixteenths where a table has their powers."""
        return 16 if self.lanes == 16 and has_lookup() and not may_grow else 1

    def nearest(self, x: Value, steps: int) -> tuple[Value, Value]:
        """x rounded to 1 / steps, and an integer whose low bits are that times steps."""
        magic = self.c(MAGIC / steps)
        shifted = self.b.fadd(x, magic)
        return self.b.fsub(shifted, magic), self.b.bitcast(shifted, self.int)

    def power(self, bits: Value, f: Value, steps: int) -> Value:
        """2^(k / steps + f), k being the low bits."""
        if steps == 1:
            p = self.b.bitcast(self.polynomial(EXP2, f), self.int)
            return self.b.bitcast(self.b.add(p, self.b.shl(bits, self.ci(23))), self.float)
        # The table saves one multiply-add, and those dominate the time. The factor of f is small,
        # so that only the last rounding matters.
        power = self.b.add(self.powers(bits), self.b.shl(bits, self.ci(19)))
        power = self.b.bitcast(power, self.float)
        return self.fma(power, self.mul(f, self.polynomial(EXP2_SLOPE, f)), power)

    def polynomial(self, coefficients: Sequence[float], x: Value) -> Value:
        p = self.c(coefficients[-1])
        for k in coefficients[-2::-1]:
            p = self.fma(p, x, self.c(k))
        return p

    def powers(self, index: Value) -> Value:
        """Bits of 2^(i/16), i the low 4 bits of index, less the i << 19 that index << 19 adds."""
        values = ir.Constant(self.float, [F32(2.0 ** (i / 16)) for i in range(16)])
        extra = ir.Constant(self.int, [I32(i << 19) for i in range(16)])
        table = self.b.sub(self.b.bitcast(values, self.int), extra)
        name = "llvm.x86.avx512.permvar.si.512"
        function = self.b.module.globals.get(name) or ir.Function(
            self.b.module, ir.FunctionType(self.int, [self.int, self.int]), name
        )
        return self.b.call(function, [table, index])

    def softplus(self, x: Value, w: Value) -> Value:
        """log(1 + e^x) = max(x, 0) + 2 artanh(w / (2 + w)), given w = e^-|x|."""
        return self._softplus(x, self.div(w, self.add(w, self.c(2.0))))

    def softplus_and_slope(self, x: Value, w: Value) -> tuple[Value, Value]:
        """softplus(x) and sigmoid(x) with a single division."""
        one, two = self.add(w, self.c(1.0)), self.add(w, self.c(2.0))
        r = self.div(self.c(1.0), self.mul(one, two))
        slope = self.mul(r, two)
        slope = self.b.select(self.b.fcmp_ordered(">=", x, self.c(0.0)), slope, self.mul(w, slope))
        return self._softplus(x, self.mul(self.mul(w, one), r)), slope

    def _softplus(self, x: Value, s: Value) -> Value:
        p = self.polynomial(ARTANH, self.mul(s, s))
        return self.fma(self.mul(s, self.c(2.0)), p, self.at_least(x, 0.0))

    def sigmoid(self, x: Value, w: Value) -> Value:
        """1 / (1 + e^-x), given w = e^-|x|."""
        r = self.div(self.c(1.0), self.add(w, self.c(1.0)))
        return self.b.select(self.b.fcmp_ordered(">=", x, self.c(0.0)), r, self.mul(w, r))


@contextmanager
def loop(b: Value, start: Value, stop: Value) -> Iterator[Value]:
    """for i in range(start, stop), the body being what is written inside the `with`."""
    before = b.block
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", index, stop), body, done)
    b.position_at_end(body)
    yield index
    index.add_incoming(b.add(index, const(1)), b.block)
    b.branch(head)
    b.position_at_end(done)


class States:
    """One vector for each of the N states: in registers up to 16 of them, else on the stack."""

    def __init__(self, v: Vector, count: int) -> None:
        self.v, self.count = v, count

    def variable(self) -> Value:
        with self.v.b.goto_entry_block():
            return self.v.b.alloca(ir.ArrayType(self.v.float, self.count))

    def scalar(self) -> Value:
        with self.v.b.goto_entry_block():
            return self.v.b.alloca(self.v.float)

    def get(self, variable: Value, n: Value) -> Value:
        return self.v.b.load(self.v.b.gep(variable, [const(0), n]))

    def set(self, variable: Value, n: Value, x: Value) -> None:
        self.v.b.store(x, self.v.b.gep(variable, [const(0), n]))

    def read(self, variable: Value, base: Value, stride: Value) -> None:
        """Fill a variable from the rows of a table."""
        self.each(lambda n: self.set(variable, n, self.v.load(base, self.v.b.mul(n, stride))))

    def write(self, variable: Value, base: Value, stride: Value) -> None:
        self.each(lambda n: self.v.store(self.get(variable, n), base, self.v.b.mul(n, stride)))

    def groups(self, body: Callable[[list[Value]], None]) -> None:
        """Call body with the indices of up to 16 states at a time; a loop if there are more."""
        full, rest = divmod(self.count, GROUP)
        if full == 1:
            body([const(n) for n in range(GROUP)])
        elif full > 1:
            with loop(self.v.b, const(0), const(full)) as group:
                first = self.v.b.mul(group, const(GROUP))
                body([self.v.b.add(first, const(n)) for n in range(GROUP)])
        if rest:
            body([const(full * GROUP + n) for n in range(rest)])

    def each(self, body: Callable[[Value], None]) -> None:
        def all_of(group: list[Value]) -> None:
            for n in group:
                body(n)

        self.groups(all_of)
