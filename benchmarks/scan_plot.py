"""Plots the time of the forward scan against the length, for every implementation.

    python benchmarks/scan_plot.py [--threads 2] [--compiled] [--out FILE] [--json FILE]

B 1, D 512, N 16, float32. An implementation that took over two seconds is left out of longer ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import scan_baselines
import scan_measure as measure

SLOW = 2e3  # milliseconds
LENGTHS = (64, 256, 1024, 2594, 8192, 32768, 65536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile'd associative_scan")
    parser.add_argument("--out", type=Path, default=Path("docs/scan.png"))
    parser.add_argument("--json", type=Path, default=Path("docs/scan.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = measure.environment()
    found: dict[str, dict[int, float]] = {}
    baselines = scan_baselines.baselines(options.compiled)
    for length in LENGTHS:
        x = measure.inputs(batch=1, length=length)
        calls = {b: measure.forward(x, b) for b in ("cpu", "chunked", "reference")}
        given = {k: x[k] for k in measure.GIVEN}
        for name, scan in baselines.items():
            if max(found.get(name, {0: 0.0}).values()) >= SLOW:
                continue
            calls[name] = measure.without_gradients(scan, scan_baselines.given(name, given))
            if name == "associative_scan":
                calls[name]()  # compiles for this length
        calls = {k: c for k, c in calls.items() if max(found.get(k, {0: 0.0}).values()) < SLOW}
        for name, times in measure.medians(calls, options.rounds).items():
            found.setdefault(name, {})[length] = times["p50"]
        print(length, {name: round(t[length], 2) for name, t in found.items() if length in t})
    options.json.write_text(
        json.dumps({"environment": environment, "milliseconds": found}, indent=1) + "\n"
    )
    draw(found, environment, options.out)


def draw(found: dict[str, dict[int, float]], environment: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, times in sorted(found.items(), key=lambda item: -max(item[1].values())):
        bold = {"linewidth": 2.5} if name in ("cpu", "chunked") else {"linestyle": "--"}
        axes.plot(list(times), list(times.values()), marker="o", label=name, **bold)
    axes.set(xscale="log", yscale="log", xlabel="length L", ylabel="forward, ms (median)")
    axes.set_title(
        f"B 1, D 512, N 16, float32, {environment['threads']} threads, {environment['device']}",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
