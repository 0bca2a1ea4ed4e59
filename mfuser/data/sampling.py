"""Which image comes next: rare-class sampling, or every image once per epoch.

Nothing here keeps a history. Sample (seed, step, slot) follows from these numbers alone, so that a
resumed run, or one on another number of processes, sees the same images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np

from mfuser.data.images import UnreadableImage
from mfuser.errors import DataError
from mfuser.files import unwritable, write_text
from mfuser.interfaces import IGNORE, Dataset

FORMAT = 1
"""Version of the cached statistics."""


_ORDER = 0x6F726465
"""Keeps an epoch's order apart from the sample of the same number."""


_MIXTURE = 0x6D6978
"""Likewise, a block's order of the sources."""

BLOCK = 1000
"""Crops in a row that hold every source's share."""


def sample_rng(*key: int) -> np.random.Generator:
    """The generator of one sample, from non-negative integers such as (seed, step, slot)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class ClassStatistics:
    """Pixels of each class in each image of a dataset.

    pixels: int64 (number of images, K).
    unreadable: names of images whose label could not be read; their counts are 0.
    """

    pixels: np.ndarray
    unreadable: tuple[str, ...] = ()

    @property
    def frequencies(self) -> np.ndarray:
        """(K,) the share of all labeled pixels that each class covers, in [0, 1]."""
        totals: np.ndarray = self.pixels.sum(axis=0)
        shares: np.ndarray = totals / max(int(totals.sum()), 1)
        return shares


def class_statistics(
    dataset: Dataset,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    workers: int = 1,
    skip_unreadable: bool = False,
) -> ClassStatistics:
    """Count the classes in every label, or read the counts from the cache.

    cache_dir: folder for the cache, a JSON file named by the dataset's fingerprint, created if
    necessary. progress: called with (labels read, labels in all). workers: threads that read
    labels; more than one only where `dataset.label` allows it. skip_unreadable: count nothing in a
    label that cannot be read, instead of failing.
    Raises DataError for labels that cannot be used and a cache folder that cannot be written,
    the latter before any label is read.
    """
    fingerprint = dataset.fingerprint() if cache_dir is not None else ""
    path = None
    if cache_dir is not None:
        key = sha256(fingerprint.encode()).hexdigest()[:16]
        path = cache_dir / f"class-statistics-{key}.json"
        known = _load(path, fingerprint, len(dataset), len(dataset.classes))
        if known is not None and (skip_unreadable or not known.unreadable):
            return known
        if reason := unwritable(cache_dir):
            raise DataError(f"{reason}; name another for the class counts")
        cache_dir.mkdir(parents=True, exist_ok=True)
    statistics = _count(dataset, progress, max(workers, 1), skip_unreadable)
    if path is not None:
        _save(path, fingerprint, statistics)
    return statistics


def _count(
    dataset: Dataset,
    progress: Callable[[int, int], None] | None,
    workers: int,
    skip_unreadable: bool,
) -> ClassStatistics:
    size, num_classes = len(dataset), len(dataset.classes)
    pixels = np.zeros((size, num_classes), np.int64)
    unreadable = []

    def read(index: int) -> np.ndarray | None:
        try:
            label = dataset.label(index)
        except UnreadableImage:
            if not skip_unreadable:
                raise
            return None
        counts = np.bincount(label.ravel(), minlength=IGNORE + 1)
        strange = np.flatnonzero(counts[num_classes:]) + num_classes
        strange = strange[strange != IGNORE]
        if len(strange):
            raise DataError(
                f"{dataset.name(index)}: label {int(strange[0])} is neither a train id (0 to "
                f"{num_classes - 1}) nor {IGNORE} (ignored)"
            )
        return counts[:num_classes]

    def results() -> Iterable[np.ndarray | None]:
        if workers == 1:
            yield from map(read, range(size))
            return
        with ThreadPoolExecutor(workers) as pool:
            # A few at a time: an error must not wait for labels that are no longer needed.
            indices = iter(range(size))
            while batch := list(islice(indices, 4 * workers)):
                yield from pool.map(read, batch)

    for index, counts in enumerate(results()):
        if counts is None:
            unreadable.append(dataset.name(index))
        else:
            pixels[index] = counts
        if progress is not None:
            progress(index + 1, size)
    return ClassStatistics(pixels, tuple(unreadable))


def _load(path: Path, fingerprint: str, size: int, num_classes: int) -> ClassStatistics | None:
    """The cached counts; None if there are none, or they are damaged or of other labels."""
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["format"] != FORMAT or data["fingerprint"] != fingerprint:
            return None
        pixels = np.asarray(data["pixels"], np.int64).reshape(-1, num_classes)
        unreadable = tuple(str(name) for name in data["unreadable"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    if len(pixels) != size or (pixels < 0).any():
        return None
    return ClassStatistics(pixels, unreadable)


def _save(path: Path, fingerprint: str, statistics: ClassStatistics) -> None:
    data = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "unreadable": statistics.unreadable,
        "pixels": statistics.pixels.tolist(),
    }
    write_text(path, json.dumps(data, separators=(",", ":")))


class RareClassSampler:
    """Images drawn by class, rare classes first (DAFormer, Hoyer et al. 2022, section 3.3).

    P(c) is proportional to exp((1 - f_c) / temperature), f_c the frequency of class c in [0, 1];
    then an image is drawn uniformly from those that show at least `min_pixels` of c (or, if no
    image does, from those that show it at all). Classes that no image shows are never drawn. At the
    released temperature of 100, P is nearly uniform; DAFormer uses 0.01.
    """

    def __init__(
        self, statistics: ClassStatistics, temperature: float = 100.0, min_pixels: int = 3000
    ) -> None:
        if not temperature > 0:
            raise DataError(
                f"the temperature of rare-class sampling must be above 0, not {temperature}"
            )
        images: dict[int, np.ndarray] = {}
        for c, pixels in enumerate(statistics.pixels.T):
            for least in (max(min_pixels, 1), 1):
                found = np.flatnonzero(pixels >= least)
                if len(found):
                    images[c] = found
                    break
        if not images:
            raise DataError(
                "rare-class sampling has no class to draw: no source label contains a train id"
            )
        self.images = images
        """Class id -> indices of the images it is drawn from."""
        self.classes = np.array(list(images))
        rarity = (1.0 - statistics.frequencies[self.classes]) / temperature
        weights = np.exp(rarity - rarity.max())
        self.probabilities = weights / weights.sum()
        """(number of classes,) as `classes`."""
        self._cumulative = np.cumsum(self.probabilities)

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """(index of an image, class id that its crop should show)."""
        place = np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], "right")
        wanted = int(self.classes[min(int(place), len(self.classes) - 1)])
        images = self.images[wanted]
        return int(images[rng.integers(len(images))]), wanted


class ShuffledSampler:
    """Every image once per epoch, in an order that depends on the seed and the epoch.

    stream: number of the source, from 0: those of one size are not read in one order.
    """

    def __init__(self, size: int, stream: int = 0) -> None:
        if size < 1:
            raise DataError("the source has no image to draw")
        self.size = size
        self._key = (_ORDER, stream) if stream else (_ORDER,)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def index_at(self, seed: int, position: int) -> int:
        """The image at `position`, counted over all epochs."""
        epoch, place = divmod(position, self.size)
        order = self._orders.get((seed, epoch))
        if order is None:
            order = sample_rng(seed, epoch, *self._key).permutation(self.size)
            # Processes of one run are at most an epoch apart: two orders are enough.
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[seed, epoch] = order
        return int(order[place])


class Mixture:
    """The source of every crop, of several that share them.

    Each BLOCK crops in a row hold the shares, to a crop, in an order that depends on the seed and
    the block. One source has them all.
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        self.seed = seed
        self.counts = _apportioned(shares, BLOCK)
        """Crops of each source in a block."""
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, number: int) -> tuple[int, int]:
        """(source of a crop, how many crops of that source come before it)."""
        if len(self.counts) == 1:
            return 0, number
        block, place = divmod(number, BLOCK)
        order, before = self._block(block)
        source = int(order[place])
        return source, block * int(self.counts[source]) + int(before[place])

    def numbers(self, source: int) -> Iterator[int]:
        """The crops of a source, in order, without end."""
        number = 0
        while True:
            if self.at(number)[0] == source:
                yield number
            number += 1

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(BLOCK,) sources, and (BLOCK,) the crops of the same source before each in the block."""
        known = self._blocks.get(block)
        if known is None:
            order = np.repeat(np.arange(len(self.counts)), self.counts)
            order = sample_rng(self.seed, block, _MIXTURE).permutation(order)
            before = np.zeros(BLOCK, np.int64)
            for source, count in enumerate(self.counts):
                before[order == source] = np.arange(count)
            known = order, before
            while len(self._blocks) > 1:  # a step may lie in two
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = known
        return known


def _apportioned(shares: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in the ratio of the shares that sum to `total`, none of them 0 (the largest
    remainders are rounded up)."""
    exact = np.asarray(shares, np.float64) / sum(shares) * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    for source in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[source] += 1
    for source in np.flatnonzero(counts == 0):
        counts[source] += 1
        counts[counts.argmax()] -= 1
    return counts
