"""The loop that each thread of a scan runs, as LLVM IR: take tasks of a job until none is left.

In Python, a thread would wait for the interpreter's lock after each task, and would often wake up
on another thread's processor.
"""

from __future__ import annotations

import ctypes

from llvmlite import ir

from mfuser_kernels.scan.cpu.vector import I64, PTR, Value, Vector, const

TASK_SIZE = 4  # numbers: batch item, first and last lane block, index of the partial sum


class Job(ctypes.Structure):
    """Tasks `next` to `stop` of a table, and scratch memory for each thread; 64-bit integers.

    `threads` counts the threads that have started, so that each finds its own scratch.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("fields", "tasks", "next", "stop", "scratch", "scratch_bytes", "threads")
    ]


def add_driver(module: Value, kernel: Value, name: str) -> None:
    """Write the function `void name(Job *)` that calls `kernel` for task after task."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), name)
    entry, head, body, done = (
        function.append_basic_block(part) for part in ("entry", "head", "body", "done")
    )
    b = ir.IRBuilder(entry)
    pointer = Vector(b, 1).pointer
    (job,) = function.args

    def field(name: str) -> Value:
        return pointer(job, const(getattr(Job, name).offset), I64)

    def read(name: str) -> Value:
        return b.load(field(name), align=8)

    def take(name: str) -> Value:
        """Read and increment a field, atomically."""
        return b.atomic_rmw("add", field(name), const(1), "monotonic")

    fields, tasks, scratch = (
        b.inttoptr(read(name), PTR) for name in ("fields", "tasks", "scratch")
    )
    scratch = b.gep(scratch, [b.mul(take("threads"), read("scratch_bytes"))])
    b.branch(head)
    b.position_at_end(head)
    task = take("next")
    stop = b.load_atomic(field("stop"), "monotonic", align=8)  # an interrupt sets it to 0
    b.cbranch(b.icmp_signed("<", task, stop), body, done)
    b.position_at_end(body)
    numbers = [
        b.load(pointer(tasks, b.mul(b.add(b.mul(task, const(TASK_SIZE)), const(i)), const(8)), I64))
        for i in range(TASK_SIZE)
    ]
    b.call(kernel, [fields, *numbers, scratch])
    b.branch(head)
    b.position_at_end(done)
    b.ret_void()
