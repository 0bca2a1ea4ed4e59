"""The scan on the CPU compared with other implementations, and the figures the project promises.

    python benchmarks/scan_cpu.py [--threads 2] [--rounds 7] [--json FILE] [--compiled]

All contenders take turns in one run; check the load of the machine first (`uptime`). On a busy
machine, `--threads 1 --processor-time` still gives usable ratios. The backward of mamba_ref is not
run: it is quadratic in the length and takes about three minutes a call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import scan_baselines
import scan_measure as measure

Clock = Callable[[], float]


def mvfuser_share(rounds: int, clock: Clock) -> dict[str, float]:
    """Milliseconds of MVFuser's forward, D 1024, and of the scans in it."""
    import mfuser_kernels
    from mfuser_plugins.fusion import mvfuser

    torch.manual_seed(0)
    module = mvfuser.MVFuser(1024, mvfuser.MVFuserSpec()).eval()
    tokens = torch.randn(2, 2594, 1024)
    real, spent = mfuser_kernels.selective_scan, 0.0
    found: dict[str, list[float]] = {"mvfuser": [], "its scan": []}

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        start = clock()
        result = real(*args, **kwargs)
        spent += clock() - start
        return result

    mfuser_kernels.selective_scan = timed  # type: ignore[assignment]
    try:
        with torch.no_grad():
            module(tokens)
            for _ in range(3 * rounds):
                spent, start = 0.0, clock()
                module(tokens)
                found["mvfuser"].append((clock() - start) * 1e3)
                found["its scan"].append(spent * 1e3)
    finally:
        mfuser_kernels.selective_scan = real
    return {name: statistics.median(times) for name, times in found.items()}


def contenders(x: dict[str, Any], compiled: bool) -> dict[str, Callable[[], None]]:
    given = {k: x[k] for k in measure.GIVEN}
    calls = {f"{b} forward": measure.forward(x, b) for b in ("cpu", "chunked", "reference")}
    calls |= {
        f"{b} forward + backward": measure.training(x, measure.ours(b))
        for b in ("cpu", "chunked", "reference")
    }
    calls["exponentials alone"] = measure.exponentials(x)
    for name, scan in scan_baselines.baselines(compiled).items():
        calls[f"{name} forward"] = measure.without_gradients(
            scan, scan_baselines.given(name, given)
        )
        if name in ("mambapy", "associative_scan"):
            calls[f"{name} forward + backward"] = measure.training(x, scan)
    if compiled:  # compile before timing
        for name in ("associative_scan forward", "associative_scan forward + backward"):
            calls[name]()
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--processor-time", action="store_true", help="instead of wall time")
    parser.add_argument("--compiled", action="store_true", help="torch.compile'd associative_scan")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = measure.environment()
    x = measure.inputs()
    name = "process_time" if options.processor_time else "perf_counter"
    environment["clock"] = name
    clock: Clock = getattr(time, name)
    found = measure.medians(contenders(x, options.compiled), options.rounds, clock=clock)
    long = {
        str(n): measure.forward(measure.inputs(length=n, batch=1), "cpu") for n in (2594, 65536)
    }
    lengths = measure.medians(long, options.rounds, slow=0, clock=clock)
    per_token = {n: lengths[n]["p50"] / int(n) for n in lengths}
    fresh = measure.start_up(options.threads, name)
    memory = {mode: measure.extra_memory(x, mode == "backward") for mode in ("forward", "backward")}
    try:
        share = mvfuser_share(options.rounds, clock)
    except ImportError as error:
        share = {}
        print(f"MVFuser not measured: {error}")

    def ratio(slow: str, fast: str) -> float:
        return found[slow]["p50"] / found[fast]["p50"]

    both = "forward + backward"
    promises: list[tuple[str, float, str, float]] = [
        ("mamba_ref / cpu, forward", ratio("mamba_ref forward", "cpu forward"), ">=", 100),
        ("cpu forward / exponentials", ratio("cpu forward", "exponentials alone"), "<=", 2.5),
        (f"chunked / cpu, {both}", ratio(f"chunked {both}", f"cpu {both}"), ">=", 20),
        (f"reference / chunked, {both}", ratio(f"reference {both}", f"chunked {both}"), ">=", 5),
        ("per token, 65,536 / 2,594", per_token["65536"] / per_token["2594"], "<=", 1.1),
        ("first process, s", fresh["first process, and backward"], "<=", 3),
        ("later process, s", fresh["later process, and backward"], "<=", 0.5),
        ("extra memory forward, MB", memory["forward"], "<=", 8),
        ("extra memory with backward, MB", memory["backward"], "<=", 16),
    ]
    if share:
        promises.append(
            ("scan in MVFuser, %", 100 * share["its scan"] / share["mvfuser"], "<=", 10)
        )
    print(", ".join(f"{k} {v}" for k, v in environment.items()))
    print(f"\n{'milliseconds':34}{'p20':>10}{'p50':>10}{'p80':>10}{'x cpu':>9}")
    for name, times in found.items():
        base = found[f"cpu {both}" if both in name else "cpu forward"]["p50"]
        row = "".join(f"{times[p]:10.2f}" for p in ("p20", "p50", "p80"))
        print(f"{name:34}{row}{times['p50'] / base:9.1f}")
    print()
    for name, value, sign, bound in promises:
        held = value >= bound if sign == ">=" else value <= bound
        print(f"{name:40}{value:10.2f}  {sign} {bound:<6} {'holds' if held else 'DOES NOT HOLD'}")
    if options.json:
        everything = {
            "environment": environment,
            "milliseconds": found,
            "per token ms": per_token,
            "start-up s": fresh,
            "extra memory MB": memory,
            "mvfuser ms": share,
            "promises": [{"name": n, "value": v, "bound": f"{s} {b}"} for n, v, s, b in promises],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
