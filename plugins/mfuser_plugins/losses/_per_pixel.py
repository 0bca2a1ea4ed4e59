"""Cross-entropy of single pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mfuser import IGNORE, LossInputs


def cross_entropy(given: LossInputs) -> tuple[Tensor, Tensor]:
    """-log probability of each labeled pixel's class, and these classes; both (N,), N may be 0."""
    labels = given.labels
    assert given.log_probs is not None, "it is declared in `needs`"
    losses = F.nll_loss(given.log_probs, labels, ignore_index=IGNORE, reduction="none")
    valid = labels != IGNORE
    return losses[valid], labels[valid]
