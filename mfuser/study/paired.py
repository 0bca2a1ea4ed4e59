"""Whether one variant of a study is better than another: paired over what both were tested on."""

from __future__ import annotations

import math
import statistics

from pydantic import BaseModel, ConfigDict

from mfuser.study.report import AVERAGE, Results, Row

SURE = 0.05


class Comparison(BaseModel):
    """Points of mIoU by which `first` is above `second` on unseen domains.

    mean, std: over all (seed, domain) that both have; `std` None for one. seeds: their number.
    p: of the two-sided paired t-test over the seeds' averages; None below two seeds.
    """

    model_config = ConfigDict(extra="forbid")

    first: str
    second: str
    mean: float
    std: float | None
    pairs: int
    seeds: int
    p: float | None

    def text(self) -> str:
        spread = f" ± {self.std:.1f}" if self.std is not None else ""
        if self.p is None:
            sure = "one seed says nothing of chance"
        else:
            found = "a difference" if self.p < SURE else "no difference that chance excludes"
            sure = f"{found}, paired t-test over {self.seeds} seeds, p = {self.p:.2f}"
        return (
            f"{self.first} against {self.second}: {self.mean:+.1f}{spread} points over "
            f"{self.pairs} pairs of seed and unseen domain; {sure}"
        )


def compare(results: Results, first: str, second: str) -> Comparison | None:
    """None where they share no seed."""
    rows = {row.label: row for row in results.rows}
    a, b = rows[first], rows[second]
    unseen = [d for d in results.domains if d not in results.seen]
    differences = [x for domain in unseen for x in _paired(a, b, domain)]
    averages = _paired(a, b, AVERAGE)
    if not differences:
        return None
    return Comparison(
        first=first,
        second=second,
        mean=statistics.fmean(differences),
        std=statistics.stdev(differences) if len(differences) > 1 else None,
        pairs=len(differences),
        seeds=len(averages),
        p=_p_value(averages),
    )


def _paired(a: Row, b: Row, domain: str) -> list[float]:
    """Differences in points, seed by seed."""
    if domain not in a.scores or domain not in b.scores:
        return []
    theirs, others = a.scores[domain].values, b.scores[domain].values
    return [100 * (theirs[s] - others[s]) for s in theirs if s in others]


def _p_value(differences: list[float]) -> float | None:
    if len(differences) < 2:
        return None
    from scipy import stats

    spread = statistics.stdev(differences)
    if spread == 0:
        return 1.0 if statistics.fmean(differences) == 0 else 0.0
    t = statistics.fmean(differences) / (spread / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def verdict(results: Results, theirs: str) -> list[Comparison]:
    """One row against every other, best rival first."""
    rivals = [r for r in results.rows if r.label != theirs and AVERAGE in r.scores]
    rivals.sort(key=lambda r: -(r.scores[AVERAGE].mean or 0.0))
    found = [compare(results, theirs, rival.label) for rival in rivals]
    return [c for c in found if c is not None]
