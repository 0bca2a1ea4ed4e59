"""Statistics and their cache, rare-class and shuffled sampling."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfuser import IGNORE, DataError, Dataset, Sample
from mfuser.data.images import UnreadableImage
from mfuser.data.sampling import (
    ClassStatistics,
    RareClassSampler,
    ShuffledSampler,
    class_statistics,
    sample_rng,
)


class Labels(Dataset):
    """Labels in memory that count how often they are read; None cannot be read."""

    def __init__(self, labels: list[np.ndarray | None], fingerprint: str = "a") -> None:
        self.labels = labels
        self.classes = ("road", "car", "train")
        self.class_ids = (0, 1, 2)
        self.reads = 0
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("statistics must not read images")

    def label(self, index: int) -> np.ndarray:
        self.reads += 1
        label = self.labels[index]
        if label is None:
            raise UnreadableImage(f"{index}.png cannot be read")
        return label

    def fingerprint(self) -> str:
        return self._fingerprint


def three() -> Labels:
    return Labels([
        np.array([[0, 0, 0, 1]]),
        np.array([[0, 0, 0, 0]]),
        np.array([[1, 2, IGNORE, IGNORE]]),
    ])  # fmt: skip


PIXELS = [[3, 1, 0], [4, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("workers", [1, 3])
def test_counts_and_progress(workers: int) -> None:
    seen: list[tuple[int, int]] = []
    statistics = class_statistics(three(), None, lambda *at: seen.append(at), workers=workers)
    assert statistics.pixels.tolist() == PIXELS
    assert statistics.frequencies.tolist() == [0.7, 0.2, 0.1]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_counted_once(tmp_path: Path) -> None:
    cache = tmp_path / "made" / "here"
    first = three()
    class_statistics(first, cache)
    assert first.reads == 3
    assert len(list(cache.iterdir())) == 1  # no temporary file is left
    again = three()
    assert class_statistics(again, cache).pixels.tolist() == PIXELS
    assert again.reads == 0
    changed = Labels(three().labels, "b")
    class_statistics(changed, cache)
    assert changed.reads == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "format": 0}),
        lambda text: json.dumps({**json.loads(text), "fingerprint": "other"}),
        lambda text: json.dumps({**json.loads(text), "pixels": [[1, 2, 3]]}),
        lambda text: json.dumps({**json.loads(text), "pixels": [[1, 2], [3]]}),
        lambda text: json.dumps({**json.loads(text), "pixels": [[-1, 2, 3]] * 3}),
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage) -> None:
    class_statistics(three(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    dataset = three()
    assert class_statistics(dataset, tmp_path).pixels.tolist() == PIXELS
    assert dataset.reads == 3
    assert json.loads(path.read_text())["pixels"] == PIXELS


def test_unreadable_labels_are_fatal_or_skipped(tmp_path: Path) -> None:
    labels = [*three().labels, None]
    with pytest.raises(UnreadableImage, match="3.png"):
        class_statistics(Labels(labels), tmp_path)
    assert not list(tmp_path.iterdir())
    statistics = class_statistics(Labels(labels), tmp_path, skip_unreadable=True)
    assert statistics.pixels.tolist() == [*PIXELS, [0, 0, 0]]
    assert statistics.unreadable == ("3",)
    with pytest.raises(UnreadableImage):  # what was skipped once is not forgiven for good
        class_statistics(Labels(labels), tmp_path)
    cached = Labels(labels)
    assert class_statistics(cached, tmp_path, skip_unreadable=True).unreadable == ("3",)
    assert cached.reads == 0


def test_strange_labels_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0: label 3 is neither a train id .0 to 2. nor 255"):
        class_statistics(Labels([np.array([[3]])]))
    (tmp_path / "file").write_text("")
    dataset = three()
    with pytest.raises(DataError, match="file cannot be written: a file of that name is there"):
        class_statistics(dataset, tmp_path / "file")
    assert dataset.reads == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_cache_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written: Permission denied"):
        class_statistics(three(), tmp_path)


def test_rare_classes_come_first() -> None:
    statistics = ClassStatistics(np.array(PIXELS))
    sampler = RareClassSampler(statistics, temperature=0.5, min_pixels=1)
    want = np.exp((1 - np.array([0.7, 0.2, 0.1])) / 0.5)
    np.testing.assert_allclose(sampler.probabilities, want / want.sum(), rtol=1e-12)
    assert {c: i.tolist() for c, i in sampler.images.items()} == {0: [0, 1], 1: [0, 2], 2: [2]}
    draws = [sampler.draw(sample_rng(0, step)) for step in range(4000)]
    counts = np.bincount([wanted for _, wanted in draws], minlength=3) / len(draws)
    # Four standard deviations of a share of 4000 draws are at most 0.032.
    np.testing.assert_allclose(counts, sampler.probabilities, atol=0.032)
    assert all(index in sampler.images[wanted] for index, wanted in draws)
    assert {index for index, wanted in draws if wanted == 0} == {0, 1}


def test_released_temperature_is_nearly_uniform_and_extremes_stay_finite() -> None:
    statistics = ClassStatistics(np.array(PIXELS))
    released = RareClassSampler(statistics).probabilities
    assert released.min() > 0.99 / 3 and released.argmax() == 2
    coldest = RareClassSampler(statistics, temperature=1e-9)
    assert coldest.probabilities.tolist() == [0, 0, 1]
    assert coldest.draw(sample_rng(1)) == (2, 2)


def test_min_pixels_and_classes_without_images() -> None:
    pixels = np.array([[5000, 10, 0], [5000, 20, 0], [100, 0, 0]])
    sampler = RareClassSampler(ClassStatistics(pixels), min_pixels=3000)
    assert {c: i.tolist() for c, i in sampler.images.items()} == {0: [0, 1], 1: [0, 1]}
    with pytest.raises(DataError, match="no class to draw"):
        RareClassSampler(ClassStatistics(np.zeros((3, 19), np.int64)))
    with pytest.raises(DataError, match="temperature"):
        RareClassSampler(ClassStatistics(pixels), temperature=0)


@given(seed=st.integers(0, 2**64), step=st.integers(0, 10**6), slot=st.integers(0, 64))
def test_a_draw_depends_on_its_numbers_alone(seed: int, step: int, slot: int) -> None:
    sampler = RareClassSampler(ClassStatistics(np.array(PIXELS)), min_pixels=1)
    first = sampler.draw(sample_rng(seed, step, slot))
    sampler.draw(sample_rng(seed, step + 1, slot))
    assert sampler.draw(sample_rng(seed, step, slot)) == first
    numbers = {float(sample_rng(*key).random()) for key in
               ((seed, step, slot), (seed + 1, step, slot), (seed, step + 1, slot),
                (seed, step, slot + 1))}  # fmt: skip
    assert len(numbers) == 4


@given(size=st.integers(1, 40), seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_image_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    sampler = ShuffledSampler(size)
    order = [sampler.index_at(seed, epoch * size + i) for i in range(size)]
    assert sorted(order) == list(range(size))
    # Asked in another order, and after other epochs, by another sampler.
    other = ShuffledSampler(size)
    for position in (epoch + 3) * size, 0, (epoch + 1) * size:
        other.index_at(seed, position)
    backwards = [other.index_at(seed, epoch * size + i) for i in reversed(range(size))]
    assert backwards[::-1] == order


def test_epochs_and_seeds_differ() -> None:
    sampler = ShuffledSampler(50)
    orders = {
        tuple(sampler.index_at(seed, 50 * epoch + i) for i in range(50))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 6
    with pytest.raises(DataError, match="no image"):
        ShuffledSampler(0)
