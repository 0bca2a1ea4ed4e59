"""Whether one variant of a study is better than another: paired over what both were tested on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from mfuser.specs import Options

SURE = 0.05
LEAST_IMAGES = 6
"""Below so many pairs no order of signs reaches SURE in Wilcoxon's test."""

Seeds = Mapping[int, float]
"""mIoU in [0, 1] of each seed."""
Images = Mapping[tuple[str, str], Seeds]
"""(domain, image) -> mIoU of the image for each seed."""


class Comparison(Options):
    """Points of mIoU by which `first` is above `second` on unseen domains.

    mean, std: over all (seed, domain) that both have; `std` None for one. seeds: their number.
    p: of the two-sided paired t-test over the seeds' averages; None below two seeds.
    images: unseen images that both were tested on. image_mean: points by which an image of
        `first` is above, averaged over the seeds, then over the images; another mean than that of
        the domains, as a class missing from an image does not count there. image_p: of Wilcoxon's
        signed-rank test over the images (two-sided). It speaks of these trained models on other
        images, `p` of training once more; None for fewer than six images.
    """

    first: str
    second: str
    mean: float
    std: float | None
    pairs: int
    seeds: int
    p: float | None
    images: int = 0
    image_mean: float | None = None
    image_p: float | None = None

    def text(self) -> str:
        spread = f" ± {self.std:.1f}" if self.std is not None else ""
        if self.p is None:
            sure = "one seed says nothing of chance"
        else:
            found = "a difference" if self.p < SURE else "no difference that chance excludes"
            sure = f"{found}, paired t-test over {self.seeds} seeds, p = {_p(self.p)}"
        told = (
            f"{self.first} against {self.second}: {self.mean:+.1f}{spread} points over "
            f"{self.pairs} pairs of seed and unseen domain; {sure}"
        )
        if self.image_p is not None:
            told += (
                f"; {self.image_mean:+.1f} points an image over {self.images} unseen images, "
                f"Wilcoxon's test, p = {_p(self.image_p)}"
            )
        return told


def compare(
    first: str,
    second: str,
    domains: Sequence[tuple[Seeds, Seeds]],
    averages: tuple[Seeds, Seeds],
    images: tuple[Images, Images] = ({}, {}),
) -> Comparison | None:
    """Two variants by their scores on each unseen domain, on average, and image by image.

    None where they share no seed.
    """
    differences = [x for pair in domains for x in _paired(*pair)]
    if not differences:
        return None
    of_seeds = _paired(*averages)
    of_images = _by_image(*images)
    return Comparison(
        first=first,
        second=second,
        mean=statistics.fmean(differences),
        std=statistics.stdev(differences) if len(differences) > 1 else None,
        pairs=len(differences),
        seeds=len(of_seeds),
        p=_t_test(of_seeds),
        images=len(of_images),
        image_mean=statistics.fmean(of_images) if of_images else None,
        image_p=_signed_ranks(of_images),
    )


def _paired(ours: Seeds, theirs: Seeds) -> list[float]:
    """Differences in points, seed by seed."""
    return [100 * (ours[s] - theirs[s]) for s in ours if s in theirs]


def _by_image(ours: Images, theirs: Images) -> list[float]:
    """Differences in points of the images that both have, each averaged over the shared seeds."""
    found = (_paired(ours[image], theirs[image]) for image in ours if image in theirs)
    return [statistics.fmean(differences) for differences in found if differences]


def _t_test(differences: list[float]) -> float | None:
    if len(differences) < 2:
        return None
    from scipy import stats

    spread = statistics.stdev(differences)
    if spread == 0:
        return 1.0 if statistics.fmean(differences) == 0 else 0.0
    t = statistics.fmean(differences) / (spread / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def _signed_ranks(differences: list[float]) -> float | None:
    if len(differences) < LEAST_IMAGES:
        return None
    if not any(differences):
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(differences).pvalue)


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"
