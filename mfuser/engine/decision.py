"""From class scores to class ids, their confidence, and probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ScoreKind = Literal["logits", "shares"]
"""`Decoder.scores`."""
STRIP = 2**19
"""Scores that are decided at once on a CPU."""


def predict_ids(
    class_scores: Tensor, size: tuple[int, ...], scored: Sequence[int] | None = None
) -> np.ndarray:
    """Scores (K, H, W) -> class ids (size), the best among `scored`."""
    return decide(class_scores, size, scored)[0]


def decide(
    class_scores: Tensor,
    size: tuple[int, ...],
    scored: Sequence[int] | None = None,
    kind: ScoreKind = "logits",
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (K, H, W) -> class ids, the best among `scored`, and their confidence in [0, 1]; both
    of `size`, int64 and float32. kind: what the scores are (`Decoder.scores`)."""
    resized = _resized(class_scores, size, scored)
    rows = resized.shape[1]
    if resized.device.type == "cpu":  # what fits into its cache takes half the time
        rows = max(1, STRIP // (len(resized) * resized.shape[2]))
    strips = [_decided(strip, kind) for strip in resized.split(rows, dim=1)]
    ids, confidence = (torch.cat(parts) for parts in zip(*strips, strict=True))
    if len(resized) != len(class_scores):
        ids = torch.as_tensor(scored, device=ids.device)[ids]
    return ids.cpu().numpy(), confidence.float().cpu().numpy()


def _decided(scores: Tensor, kind: ScoreKind) -> tuple[Tensor, Tensor]:
    best, ids = scores.max(0)  # argmax alone takes four times as long on a CPU
    if kind == "shares":
        return ids, best / scores.sum(0).clamp_min(1e-12)
    return ids, (best - scores.logsumexp(0)).exp()


def probabilities(
    class_scores: Tensor,
    size: tuple[int, ...],
    scored: Sequence[int] | None = None,
    kind: ScoreKind = "logits",
) -> Tensor:
    """Scores (K, H, W) -> probabilities of the classes in `scored` (all), (len(scored), *size)."""
    resized = _resized(class_scores, size, scored)
    if kind == "logits":
        return resized.softmax(0)
    return resized / resized.sum(0).clamp_min(1e-12)


def _resized(class_scores: Tensor, size: tuple[int, ...], scored: Sequence[int] | None) -> Tensor:
    if class_scores.shape[-2:] != torch.Size(size):
        class_scores = F.interpolate(
            class_scores[None], (size[0], size[1]), mode="bilinear", align_corners=False
        )[0]
    if scored is None or len(scored) == len(class_scores):
        return class_scores
    return class_scores[torch.as_tensor(scored, device=class_scores.device)]
