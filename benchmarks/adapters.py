"""The cost of each fusion adapter, its growth with length, and whether the stated figures hold.

    python benchmarks/adapters.py [--threads 2] [--json FILE] [--plot FILE]
    python benchmarks/adapters.py --adapters mvfuser self_attention_concat --curve 256 1024

Sizes as in table 3 of the paper: D = 1024, batch 2, 2 x 1297 tokens. Check the load of the machine
first (`uptime`). `mfuser ablate adapter_efficiency` measures the same with one process per adapter,
and can be resumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from mfuser.plugins.discovery import components
from mfuser.reporting import adapter_cost
from mfuser.reporting.adapter_cost import AdapterCost, Growth
from mfuser.specs import FusionSpec

ADAPTERS = (
    "self_attention_concat",
    "self_attention_separate",
    "bi_deformable_attention",
    "cross_attention",
    "convolution",
    "separate_mvfuser",
    "mvfuser",
)
ATTENTION = ("self_attention_concat", "self_attention_separate", "bi_deformable_attention")
"""The attention adapters of table 3, in which tokens attend to tokens. (`cross_attention` attends
to 100 learned ones only and needs fewer operations than MVFuser.)"""
CURVE = (256, 512, 1024, 2048, 4096, 8192, 16384)
TABLE_3 = {
    "self_attention_concat": (4.20, 98.64),
    "self_attention_separate": (8.40, 71.08),
    "bi_deformable_attention": (3.35, 34.65),
    "mvfuser": (1.67, 17.21),
}
"""Parameters (M) and GFLOPs."""
DRIFT = 0.15
"""Largest relative difference of MVFuser's time per token between 2,594 and 32,768 tokens."""


def specs(names: list[str]) -> dict[str, FusionSpec]:
    known = components("fusion")
    absent = [name for name in names if name not in known]
    if absent:
        raise SystemExit(
            f"there is no fusion component '{absent[0]}'; available: {', '.join(known)}"
        )
    return {name: known[name]() for name in names}  # type: ignore[misc]


def promises(costs: list[AdapterCost], growths: list[Growth]) -> dict[str, bool]:
    """Each promise about these figures -> whether it holds; unmeasured ones are left out."""
    kept = {}
    at = {cost.adapter: cost for cost in costs}
    for name, (params, gflops) in TABLE_3.items():
        if name in at and (at[name].batch, at[name].tokens) == (2, 2594):
            found = round(at[name].params / 1e6, 2), round((at[name].flops or 0) / 1e9, 2)
            kept[f"{name}: {found[0]} M, {found[1]} GFLOPs"] = found == (params, gflops)
    if "mvfuser" not in at:
        return kept
    grown = {g.adapter: {p.tokens: p for p in g.points} for g in growths}
    least = at["mvfuser"].tokens
    for name in (n for n in ATTENTION if n in at):
        slower = [at[name].forward.p50 > at["mvfuser"].forward.p50]
        ours, theirs = grown.get("mvfuser", {}), grown.get(name, {})
        slower += [
            theirs[n].forward.p50 > ours[n].forward.p50
            for n in sorted(set(ours) & set(theirs))
            if n >= least
        ]
        kept[f"mvfuser is faster than {name} at all {len(slower)} lengths from {least:,}"] = all(
            slower
        )
    per_token = [at["mvfuser"].seconds_a_token] + [
        p.seconds_a_token for n, p in grown.get("mvfuser", {}).items() if n >= least
    ]
    drift = max(per_token) / min(per_token) - 1
    kept[f"mvfuser's time per token differs by {drift:.1%} over those lengths"] = drift <= DRIFT
    return kept


def table(costs: list[AdapterCost]) -> list[str]:
    lines = [
        "| adapter | params M | GFLOPs | scan GFLOPs | forward s | backward s | peak MB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for c in costs:
        cells = [f"{c.params / 1e6:.2f}", _giga(c.flops), _giga(c.scan_flops)]
        cells += [f"{c.forward.p50:.3f}", f"{c.backward.p50:.3f}" if c.backward else ""]
        cells.append(f"{c.peak_bytes / 1e6:.0f}" if c.peak_bytes is not None else "")
        lines.append("| " + " | ".join([c.adapter, *cells]) + " |")
    return lines


def curve(growths: list[Growth]) -> list[str]:
    """Microseconds per token, by tokens of both encoders, and the fitted exponent."""
    lengths = sorted({p.tokens for g in growths for p in g.points})
    lines = [
        "| adapter | " + " | ".join(f"{n:,}" for n in lengths) + " | time ~ length^ |",
        "|---" + "|--:" * (len(lengths) + 1) + "|",
    ]
    for g in growths:
        found = {p.tokens: f"{1e6 * p.seconds_a_token:.1f}" for p in g.points}
        exponent = "" if g.exponent is None else f"{g.exponent:.2f}"
        cells = [g.adapter, *(found.get(n, "") for n in lengths), exponent]
        lines.append("| " + " | ".join(cells) + " |")
    return lines + [f"{g.adapter}: {g.stopped}." for g in growths if g.stopped]


def plot(growths: list[Growth], path: Path) -> None:
    """Forward time over length, both logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit('--plot needs matplotlib: pip install "mfuser[plot]"') from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for g in growths:
        label = g.adapter if g.exponent is None else f"{g.adapter} (~ length^{g.exponent:.2f})"
        seconds = [p.forward.p50 for p in g.points]
        axis.loglog([p.tokens for p in g.points], seconds, "o-", label=label, markersize=4)
    axis.set_xlabel("tokens of both encoders")
    axis.set_ylabel("forward, s")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _tell(point: AdapterCost) -> None:
    per_token = 1e6 * point.seconds_a_token
    print(f"  {point.tokens:,} tokens: {per_token:.1f} us per token", file=sys.stderr)


def _giga(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


def main(arguments: list[str] | None = None) -> dict[str, bool]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS))
    parser.add_argument("--curve", nargs="*", type=int, default=list(CURVE))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--grid", type=int, default=36, help="patches per side; 36 as in table 3")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a pass may take")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    machine = adapter_cost.machine(given.device)
    sizes: dict[str, Any] = {"width": given.width, "batch": given.batch, "device": given.device}
    costs, growths = [], []
    for name, spec in specs(given.adapters).items():
        print(f"{name}: {given.grid}x{given.grid} patches", file=sys.stderr)
        grid = (given.grid, given.grid)
        costs.append(adapter_cost.adapter_cost(spec, name, grid=grid, prefix=1, **sizes))
        if given.curve:
            growths.append(
                adapter_cost.growth(
                    spec, name, tokens=given.curve, limit=given.limit, on_point=_tell, **sizes
                )
            )
    lines = [", ".join(f"{k} {v}" for k, v in machine.items()), ""]
    lines += [f"D {given.width}, batch {given.batch}, {costs[0].tokens:,} tokens:", ""]
    lines += [*table(costs), ""]
    if growths:
        lines += ["Forward, µs per token, by tokens of both encoders:", "", *curve(growths), ""]
    kept = promises(costs, growths)
    lines += [f"{'holds' if held else 'FAILS'}: {what}" for what, held in kept.items()]
    print("\n".join(lines))
    if given.json:
        results = {
            "machine": machine,
            "costs": [c.model_dump() for c in costs],
            "growth": [g.model_dump() for g in growths],
            "promises": kept,
        }
        given.json.write_text(json.dumps(results, indent=1), "utf-8")
    if given.plot:
        plot(growths, given.plot)
    return kept


if __name__ == "__main__":
    raise SystemExit(0 if all(main().values()) else 1)
