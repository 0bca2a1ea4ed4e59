"""Comparisons of two variants, paired by seed and by image."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mfuser.study.paired import Comparison, compare
from mfuser.study.report import AVERAGE, Results, Row, Score

By = dict[int, tuple[float, float]]
"""Seed -> mIoU on two unseen domains."""


def compared(first: By, second: By, **images: object) -> Comparison | None:
    def scores(by: By, k: int) -> dict[int, float]:
        return {seed: values[k] for seed, values in by.items()}

    def average(by: By) -> dict[int, float]:
        return {seed: sum(values) / 2 for seed, values in by.items()}

    domains = [(scores(first, k), scores(second, k)) for k in (0, 1)]
    return compare("a", "b", domains, (average(first), average(second)), **images)  # type: ignore[arg-type]


def test_pairing_takes_out_what_both_have_in_common() -> None:
    """Seeds differ by tens of points, the variants by two in each: a difference."""
    ours = {0: (0.30, 0.10), 1: (0.50, 0.33), 2: (0.70, 0.52)}
    theirs = {s: (a - 0.02, b - 0.02) for s, (a, b) in ours.items()}
    found = compared(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(2.0) and found.std == pytest.approx(0, abs=1e-9)
    assert found.pairs == 6 and found.seeds == 3
    assert found.p is not None and found.p < 0.001


def test_noise_is_no_difference() -> None:
    ours = {0: (0.30, 0.10), 1: (0.28, 0.12), 2: (0.31, 0.09)}
    theirs = {0: (0.29, 0.12), 1: (0.30, 0.11), 2: (0.29, 0.10)}
    found = compared(ours, theirs)
    assert found is not None and found.p is not None and found.p > 0.3
    assert "no difference that chance excludes" in found.text()
    averages = [sum(ours[s]) / 2 - sum(theirs[s]) / 2 for s in ours]
    assert found.p == pytest.approx(stats.ttest_1samp(averages, 0).pvalue)


def test_one_seed_says_nothing_of_chance() -> None:
    found = compared({0: (0.3, 0.2)}, {0: (0.2, 0.2)})
    assert found is not None and found.p is None and "one seed says nothing" in found.text()
    assert compared({0: (0.3, 0.2)}, {1: (0.2, 0.2)}) is None


def test_images_are_paired_over_the_seeds_that_both_have() -> None:
    rng = np.random.default_rng(0)
    names = [("fog", str(i)) for i in range(20)]
    theirs = {name: {0: float(rng.uniform(0.1, 0.6)), 1: 0.9} for name in names}
    gain = rng.normal(0.03, 0.01, 20)
    ours = {
        name: {0: theirs[name][0] + float(g), 2: 0.1} for name, g in zip(names, gain, strict=True)
    }
    ours["fog", "ours alone"] = {0: 0.0}
    found = compared({0: (0.3, 0.2)}, {0: (0.3, 0.2)}, images=(ours, theirs))
    assert found is not None and found.images == 20
    assert found.image_mean == pytest.approx(100 * gain.mean())
    assert found.image_p == pytest.approx(stats.wilcoxon(gain).pvalue, rel=1e-6)
    assert "points an image over 20 unseen images, Wilcoxon's test, p = below 0.001" in found.text()


def test_few_images_and_equal_ones() -> None:
    image = {("fog", str(i)): {0: 0.5} for i in range(8)}
    same = compared({0: (0.3, 0.2)}, {0: (0.3, 0.2)}, images=(image, image))
    assert same is not None and same.image_p == 1.0
    few = dict(list(image.items())[:5])
    found = compared({0: (0.3, 0.2)}, {0: (0.3, 0.2)}, images=(few, few))
    assert found is not None and found.images == 5 and found.image_p is None
    assert "Wilcoxon" not in found.text()


def test_the_reference_meets_every_other_variant_the_best_first() -> None:
    def row(label: str, value: float | None) -> Row:
        scores = (
            {} if value is None else {"fog": Score.of({0: value}), AVERAGE: Score.of({0: value})}
        )
        return Row(label=label, choices={}, trained=1, states={0: "finished"}, messages={},
                   scores=scores, paper={})  # fmt: skip

    rows = [row("a", 0.2), row("b", 0.4), row("c", 0.3), row("open", None)]
    found = Results(study="s", base="b", protocol={}, notes=[], domains=["fog"], seen=[], rows=rows)
    assert [(c.first, c.second) for c in found.against("c", {})] == [("c", "b"), ("c", "a")]
    assert [(c.first, c.second) for c in found.against(None, {})] == [("b", "c"), ("b", "a")]
    assert found.against("open", {}) == []
    assert found.against(None, {})[0].mean == pytest.approx(10)
