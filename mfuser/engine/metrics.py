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
