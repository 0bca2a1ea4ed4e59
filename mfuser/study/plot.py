"""Plots of results, if matplotlib (the extra `plot`) is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfuser.files import replacing

if TYPE_CHECKING:
    from mfuser.study.adapters import AdapterResults
    from mfuser.study.report import Results

MISSING = 'no plot: matplotlib is not installed (pip install "mfuser[plot]")'


def plot_results(results: Results, path: Path) -> str | None:
    """A panel per domain: each seed a dot, mean and standard deviation. Returns the reason if
    there is no plot."""
    figure_type = _figure()
    if figure_type is None:
        return MISSING
    columns = [c for c in results.columns if any(c in row.scores for row in results.rows)]
    if not columns:
        return "no plot: no run has finished"
    rows = list(reversed(results.rows))
    figure = figure_type(figsize=(1.6 + 2.2 * len(columns), 1.2 + 0.4 * len(rows)))
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        for y, row in enumerate(rows):
            score = row.scores.get(column)
            if score is not None and score.mean is not None:
                values = [100 * v for v in score.values.values()]
                axis.plot(values, [y] * len(values), ".", color="0.3", zorder=4)
                spread = 100 * score.std if score.std is not None else None
                axis.errorbar(
                    100 * score.mean, y, xerr=spread, fmt="o", color="C0", capsize=3, zorder=2
                )
            if column in row.paper:
                axis.plot(row.paper[column], y, "x", color="C1", zorder=3)
        axis.set_title(column + (" (source)" if column in results.seen else ""), fontsize=9)
        axis.set_xlabel("mIoU in %", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_ylim(-0.5, len(rows) - 0.5)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
    figure.suptitle(
        f"{results.study}: dots are seeds, bars standard deviations"
        + (", crosses the paper's" if results.with_paper else ""),
        fontsize=9,
    )
    _save(figure, path)
    return None


def plot_growth(results: AdapterResults, path: Path) -> str | None:
    """Forward time over length, both axes logarithmic. Returns the reason if there is no plot."""
    figure_type = _figure()
    if figure_type is None:
        return MISSING
    grown = [g for g in results.growth if g.points]
    if not grown:
        return "no plot: no curve was measured"
    figure = figure_type(figsize=(6.4, 4.4))
    axis = figure.subplots()
    for one in grown:
        slope = f", length^{one.exponent:.2f}" if one.exponent is not None else ""
        axis.plot(
            [p.tokens for p in one.points],
            [p.forward.p50 for p in one.points],
            "o-",
            label=f"{one.adapter}{slope}",
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens of both encoders")
    axis.set_ylabel("forward pass in s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    first = results.machines[0] if results.machines else {}
    axis.set_title(
        f"width {results.width}, batch {results.batch}, {first.get('device', '')}, "
        f"{first.get('threads', '?')} thread(s)",
        fontsize=9,
    )
    _save(figure, path)
    return None


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def _save(figure: Any, path: Path) -> None:
    figure.set_layout_engine("tight")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
