"""A part of a dataset, as a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from mfuser.interfaces import Dataset, Sample


class Part(Dataset):
    """The images of these indices, in this order."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)
        self.classes, self.class_ids = dataset.classes, dataset.class_ids
        self.test_size = dataset.test_size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.indices[index]]

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[index])

    def label(self, index: int) -> np.ndarray:
        return self.dataset.label(self.indices[index])

    def image_file(self, index: int) -> Path | None:
        return self.dataset.image_file(self.indices[index])

    def raw(self, index: int) -> np.ndarray | None:
        return self.dataset.raw(self.indices[index])

    def fingerprint(self) -> str:
        chosen = sha256(repr(self.indices).encode()).hexdigest()[:16]
        return f"{self.dataset.fingerprint()}:{chosen}"


def thinned(dataset: Dataset, count: int) -> Part:
    """At most `count` images, evenly spaced."""
    count = min(count, len(dataset))
    return Part(dataset, np.linspace(0, len(dataset) - 1, count, dtype=int).tolist())


def divided(dataset: Dataset, count: int) -> tuple[Part, Part]:
    """Without `count` images, and those: the same ones in every run, spread by chance."""
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    return Part(dataset, sorted(order[count:])), Part(dataset, sorted(order[:count]))
