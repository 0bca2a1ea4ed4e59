"""Measures time, memory and start-up for the scan benchmarks."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from mfuser_kernels import selective_scan
from mfuser_kernels.testing import scan_inputs

SHAPE = {"batch": 2, "length": 2594, "width": 512, "states": 16}
PACKAGES = ("torch", "triton", "llvmlite", "mamba-ssm", "transformers", "mambapy")
GIVEN = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def inputs(**changes: Any) -> dict[str, Any]:
    """As in MVFuser: skip and bias, no gate; SHAPE unless changed."""
    return scan_inputs(**{**SHAPE, **changes}, gate=False)


def forward(x: dict[str, Any], backend: str) -> Callable[[], None]:
    return without_gradients(selective_scan, {**x, "backend": backend})


def without_gradients(scan: Callable[..., Any], given: dict[str, Any]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            scan(**given)

    return call


def training(x: dict[str, Any], scan: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """Forward and backward; `scan` takes the arguments of `x` that GIVEN names."""
    leaves = {k: x[k].clone().requires_grad_() for k in GIVEN}
    gradient = torch.randn_like(x["u"])

    def call() -> None:
        torch.autograd.grad(scan(**leaves), list(leaves.values()), gradient)

    return call


def ours(backend: str) -> Callable[..., torch.Tensor]:
    def scan(**given: torch.Tensor) -> torch.Tensor:
        return selective_scan(**given, delta_softplus=True, layout="bld", backend=backend)

    return scan


def medians(
    calls: dict[str, Callable[[], None]],
    rounds: int,
    slow: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    sync: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Milliseconds (p20, p50, p80), contenders in turn, so that a busy moment affects all of them.

    A call under `slow` seconds runs three times a round; one above five seconds once in all.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}

    def once(name: str) -> float:
        sync()
        start = clock()
        calls[name]()
        sync()
        return (clock() - start) * 1e3

    first = {name: once(name) for name in calls}
    for name, cost in first.items():
        if cost > 5e3:
            times[name].append(cost)
    for _ in range(rounds):
        for name in calls:
            if first[name] <= 5e3:
                for _ in range(3 if first[name] < slow * 1e3 else 1):
                    times[name].append(once(name))
    return {name: _percentiles(found) for name, found in times.items()}


def _percentiles(found: list[float]) -> dict[str, float]:
    if len(found) < 2:
        return {"p20": found[0], "p50": found[0], "p80": found[0]}
    tenths = statistics.quantiles(found, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": statistics.median(found), "p80": tenths[7]}


def exponentials(x: dict[str, Any]) -> Callable[[], None]:
    """Only the decays: one product and one 2^x per step, channel and state, summed."""
    from mfuser_kernels.scan.cpu import compiler, kernels, run
    from mfuser_kernels.scan.cpu.vector import const, loop
    from mfuser_kernels.scan.inputs import ScanInputs

    def builder(variant: kernels.Variant, name: str) -> str:
        k = kernels.Kernel(variant, name, kernels.LANES)
        b, v, states = k.b, k.v, k.n
        A, total = states.variable(), states.scalar()
        with loop(b, const(0), k.chunks) as chunk, loop(b, k.first, k.last) as block:
            k.place(chunk, block)
            k.read_tables(A=A)
            with loop(b, const(0), k.steps) as t:
                row = b.mul(t, k.row)
                delta = k.read_row("delta", row)
                b.store(v.c(0.0), total)

                def step(n: Any, delta: Any = delta) -> None:
                    decay = v.exp2(v.mul(delta, states.get(A, n)), may_grow=False)
                    b.store(v.add(decay, b.load(total)), total)

                states.each(step)
                k.write_row(b.load(total), "out", row)
        return k.finish()

    B, C = (x[m].unsqueeze(2) for m in "BC")
    scan = ScanInputs(x["u"], x["delta"], x["A"], B, C, None, None, None, None, True)
    variant = run.Layout(scan).variant
    code = compiler.compile_object(builder(variant, "exponentials"))
    compiler._functions["exponentials", variant] = compiler._link("exponentials", code)

    def call() -> None:
        lay = run.Layout(scan)
        lay.hold(out=lay.empty_rows())
        blocks = lay.width // kernels.LANES
        tasks = [
            (i, k, min(k + 2, blocks), 0) for i in range(scan.batch) for k in range(0, blocks, 2)
        ]
        lay.run("exponentials", tasks)

    return call


def extra_memory(x: dict[str, Any], backward: bool) -> float:
    """Peak MB that torch allocates during one call, beyond outputs and gradients."""
    from torch.profiler import ProfilerActivity, profile

    given = {k: x[k].clone().requires_grad_(backward) for k in GIVEN}
    gradient = torch.ones_like(x["u"])

    def call() -> list[torch.Tensor]:
        out = ours("cpu")(**given)
        if not backward:
            return [out]
        return [out, *torch.autograd.grad(out, list(given.values()), gradient)]

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        made = call()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(itertools.accumulate(change for _, change in changes))
    return (peak - sum(t.nbytes for t in made)) / 2**20


PROGRAM = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
from mfuser_kernels import selective_scan
from mfuser_kernels.testing import scan_inputs
x = scan_inputs(1, 4, 512, 16, gate=False)
clock = getattr(time, sys.argv[2])
start = clock()
selective_scan(**x, backend="cpu")
first = clock() - start
selective_scan(x.pop("u").requires_grad_(), **x, backend="cpu").sum().backward()
print(first, clock() - start)
"""


def start_up(threads: int, clock: str) -> dict[str, float]:
    """Seconds of the first scan in a process, with an empty cache and then with a filled one."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for process in ("first", "later"):
            text = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(threads), clock],
                env={**os.environ, "MFUSER_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            names = (f"{process} process, forward", f"{process} process, and backward")
            found |= dict(zip(names, map(float, text.split()), strict=True))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    device = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        device = names[0] if names else device
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, {device}"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load in the last minute before": round(load[0], 2),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **SHAPE,
    }
