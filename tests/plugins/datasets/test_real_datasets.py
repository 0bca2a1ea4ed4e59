"""CamVid and BDD100K on the real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mfuser import IGNORE
from mfuser.data.sampling import class_statistics
from mfuser_plugins.datasets.bdd100k import Bdd100kSpec
from mfuser_plugins.datasets.camvid import CamvidSpec

pytestmark = pytest.mark.real

ROAD, BUILDING, SKY = 0, 2, 10


@pytest.mark.parametrize(
    ("sequences", "split", "size"),
    [("0016E5+0006R0", "train", 47), ("0016E5", "val", 13), ("Seq05VD", "val", 30),
     ("0001TP", "val", 15), (None, "train", 62), (None, "val", 58)],
)  # fmt: skip
def test_camvid_splits(real: Path, sequences: str | None, split: str, size: int) -> None:
    dataset = CamvidSpec(sequences=sequences).build(real / "camvid", split)
    assert len(dataset) == size
    sample = dataset[0]
    assert sample.image.shape == (360, 480, 3) and sample.label.shape == (360, 480)
    if sequences and "+" not in sequences:
        assert sample.name.startswith(sequences)


def mean_row(label: np.ndarray, train_id: int) -> float:
    """Mean height of a class, 0 at the top, 1 at the bottom."""
    return float(np.nonzero(label == train_id)[0].mean() / label.shape[0])


def test_camvid_classes_lie_where_they_must(real: Path) -> None:
    dataset = CamvidSpec().build(real / "camvid", "train")
    counts = class_statistics(dataset).pixels.sum(axis=0)
    assert set(np.flatnonzero(counts)) == set(dataset.class_ids)
    for index in range(0, len(dataset), 10):
        label = dataset.label(index)
        assert mean_row(label, SKY) < mean_row(label, BUILDING) < mean_row(label, ROAD)


def test_bdd100k_colormaps_hold_train_ids(real: Path) -> None:
    dataset = Bdd100kSpec(split="train").build(real / "bdd100k", "val")
    assert len(dataset) == 16
    seen: set[int] = set()
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.image.shape == (720, 1280, 3)
        classes = set(np.unique(sample.label).tolist())
        if {SKY, ROAD} <= classes:
            assert mean_row(sample.label, SKY) < mean_row(sample.label, ROAD)
        seen |= classes
    assert {ROAD, BUILDING, SKY, 13, IGNORE} <= seen
