"""Intersection over union from a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mfuser.interfaces import IGNORE


class Confusion:
    """Counts of (true, predicted) pixels over K classes, over as many images as are added."""

    def __init__(self, num_classes: int) -> None:
        self.counts = np.zeros((num_classes, num_classes), np.int64)

    def add(self, label: np.ndarray, prediction: np.ndarray) -> None:
        """Integer arrays of one shape; pixels labeled 255 do not count."""
        k = len(self.counts)
        valid = label != IGNORE
        pairs = label[valid].astype(np.int64) * k + prediction[valid]
        self.counts += np.bincount(pairs, minlength=k * k).reshape(k, k)


@dataclass(frozen=True)
class Scores:
    """iou: (K,) in [0, 1], NaN where a class is neither labeled nor predicted, or not scored."""

    iou: np.ndarray
    accuracy: float

    @property
    def miou(self) -> float:
        """Mean over the classes that have a value (mmsegmentation's definition)."""
        return float(np.nanmean(self.iou)) if np.isfinite(self.iou).any() else float("nan")


def scores(counts: np.ndarray, scored: tuple[int, ...]) -> Scores:
    """IoU of each class in `scored` = TP / (TP + FP + FN)."""
    hits = np.diag(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    iou = np.full(len(counts), np.nan)
    for k in scored:
        if union[k]:
            iou[k] = hits[k] / union[k]
    total = counts.sum()
    return Scores(iou, float(hits.sum() / total) if total else float("nan"))


BINS = 15
"""Bins of the reliability diagram, as in Guo et al. (ICML 2017) and by torchmetrics' default."""


class Calibration:
    """Calibration error: pixels, their confidence and their hits in bins of equal width.

    Expected calibration error (Naeini et al., AAAI 2015; scored by BRAVO): the mean over pixels of
    |accuracy - confidence| of their bin.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((3, BINS), np.float64)
        """(pixels, sum of confidence, hits) of each bin."""

    def add(self, label: np.ndarray, prediction: np.ndarray, confidence: np.ndarray) -> None:
        """Arrays of one shape; confidence in [0, 1]; pixels labeled 255 do not count."""
        valid = label != IGNORE
        certain = confidence[valid].astype(np.float64)
        place = np.clip(np.ceil(certain * BINS).astype(np.int64) - 1, 0, BINS - 1)
        hits = (label[valid] == prediction[valid]).astype(np.float64)
        for row, weights in enumerate((None, certain, hits)):
            self.sums[row] += np.bincount(place, weights, minlength=BINS)

    @property
    def error(self) -> float:
        pixels, certain, hits = self.sums
        return float(np.abs(hits - certain).sum() / pixels.sum()) if pixels.sum() else float("nan")
