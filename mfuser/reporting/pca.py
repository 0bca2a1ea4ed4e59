"""Features as colors: their first three principal components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST = 4000
"""Features that the directions are computed from; the mean is of all."""
SPREADS = 2.0
"""Standard deviations from the mean to the ends of a color channel."""


@dataclass(frozen=True)
class Components:
    """mean (D,), directions (3, D), spread (3,): standard deviations along them."""

    mean: Tensor
    directions: Tensor
    spread: Tensor

    @staticmethod
    def of(features: Tensor) -> Components:
        """The three main directions of features (n, D)."""
        features = features.float()
        mean = features.mean(0)
        thinned = features[:: max(1, len(features) // MOST)] - mean
        _, _, directions = torch.linalg.svd(thinned, full_matrices=False)
        directions = directions[:3]
        return Components(mean, directions, ((features - mean) @ directions.T).std(0))

    def project(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., 3)."""
        return (features.float() - self.mean) @ self.directions.T

    def facing(self, features: Tensor, other: Components, theirs: Tensor) -> Components:
        """With signs that make these features (n, D) vary as `theirs` do along `other`."""
        ours = self.project(features)
        along = other.project(theirs)
        signs = torch.where((ours * (along - along.mean(0))).sum(0) < 0, -1.0, 1.0)
        return Components(self.mean, self.directions * signs[:, None], self.spread)

    def colors(self, projected: Tensor, spread: Tensor | None = None) -> np.ndarray:
        """(..., 3) of `project` -> uint8, the mean in the middle of each channel."""
        ends = (SPREADS * (self.spread if spread is None else spread)).clamp_min(1e-12)
        colored: np.ndarray = ((projected / ends).clamp(-1, 1) * 127 + 128).cpu().numpy()
        return colored.astype(np.uint8)
