"""Pixel-text alignment: the similarity map and its loss (paper, section 4.2, eq. 12)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser.interfaces import IGNORE


def score_map(dense: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine similarities of patches and classes.

    dense (B, T, C) with T = h * w, row by row, text (B, K, C) -> (B, K, h, w) in [-1, 1].
    """
    similarity = F.normalize(text, dim=-1) @ F.normalize(dense, dim=-1).transpose(1, 2)
    scores: Tensor = similarity.unflatten(-1, grid)
    return scores


def alignment_loss(
    scores: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None = None,
    kind: Literal["softmax", "sigmoid"] = "softmax",
) -> Tensor:
    """Per-pixel classification of the similarity map, at the resolution of the labels.

    scores (B, K, h, w), labels (B, H, W) with 255 ignored -> scalar. The logits are
    scale * scores + bias: 1 / temperature and no bias for CLIP, SigLIP's own scale and bias. With
    "softmax", cross-entropy over the classes (where the bias cancels); with "sigmoid", binary
    cross-entropy of each class, averaged over classes too. Ignored pixels add nothing to the sum
    but count in the mean, as in the released implementation.
    """
    logits = scores * scale
    if bias is not None:
        logits = logits + bias
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    if kind == "softmax":
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return total / labels.numel()
    valid = labels != IGNORE  # (B, H, W)
    targets = torch.zeros_like(logits)
    targets.scatter_(1, labels.where(valid, 0).unsqueeze(1), 1.0)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (loss * valid.unsqueeze(1)).mean()
