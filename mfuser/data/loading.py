"""The stream of training batches, and datasets seen through a model's classes.

Labels are bytes from their files to the device, and become int64 there.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mfuser.data.images import UnreadableImage
from mfuser.data.lookup import ByteTable
from mfuser.data.pictures import Picture, open_picture
from mfuser.data.sampling import (
    ClassStatistics,
    Mixture,
    RareClassSampler,
    ShuffledSampler,
    sample_rng,
)
from mfuser.data.transforms import Augmentation
from mfuser.errors import DataError, MFuserError
from mfuser.interfaces import IGNORE, Dataset

Crop = tuple[Tensor, Tensor, list[str], str]
"""Image (3, H, W) uint8, label (H, W) uint8, names of unreadable images before it."""

HANGING = 60
"""Seconds that a loader worker goes on for after SIGTERM, of which it may need some to end."""
TRIES = 20
"""Unreadable images in a row after which a source is given up."""


class ClassMap:
    """Labels of a dataset in the class ids of a model, matched by name."""

    def __init__(self, dataset: Dataset, classes: tuple[str, ...]) -> None:
        ids = {name: k for k, name in enumerate(classes)}
        known = {i: ids[dataset.classes[i]] for i in dataset.class_ids if dataset.classes[i] in ids}
        if not known:
            raise DataError(
                f"the dataset's classes ({', '.join(dataset.classes[:5])}, …) and the pairing's "
                f"({', '.join(classes[:5])}, …) have no name in common"
            )
        self.shared = tuple(sorted(known.values()))
        """The model's class ids that the dataset labels."""
        self._size = len(classes)
        self._known = len(dataset.classes)
        self._table = np.full(256, IGNORE, np.int64)
        self._table[self._known : IGNORE] = -1
        for theirs, ours in known.items():
            self._table[theirs] = ours
        self._bytes = ByteTable(self._table)

    def __call__(self, label: np.ndarray, name: str = "a label") -> np.ndarray:
        """Raises DataError naming the sample for values that are not train ids."""
        least, most = (int(label.min()), int(label.max())) if label.size else (0, 0)
        if least < 0 or most > IGNORE:
            raise _strange(name, least if least < 0 else most, self._known)
        mapped: np.ndarray = self._table[label]
        if (mapped < 0).any():
            raise _strange(name, int(label[mapped < 0][0]), self._known)
        return mapped

    def to_bytes(self, label: np.ndarray, name: str = "a label") -> np.ndarray:
        """The same as uint8 (H, W): a pairing has at most 255 classes."""
        mapped = self._bytes(label) if label.dtype == np.uint8 else None
        return self(label, name).astype(np.uint8) if mapped is None else mapped

    def statistics(self, theirs: ClassStatistics) -> ClassStatistics:
        """Class counts of the dataset, in the model's classes; those it lacks are left out."""
        pixels = np.zeros((len(theirs.pixels), self._size), np.int64)
        for column, ours in enumerate(self._table[: theirs.pixels.shape[1]]):
            if ours != IGNORE:
                pixels[:, ours] = theirs.pixels[:, column]
        return ClassStatistics(pixels, theirs.unreadable)


def _strange(name: str, value: int, known: int) -> DataError:
    return DataError(
        f"{name}: label {value} is neither a train id (0 to {known - 1}) nor {IGNORE} (ignored)"
    )


@dataclass
class Batch:
    """images: uint8 (B, 3, H, W). labels: uint8 (B, H, W). skipped: names of unreadable images.
    names: of the images that the crops are from."""

    images: Tensor
    labels: Tensor
    skipped: list[str]
    names: list[str]
    _there: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    """The images and labels on the device, where their copies have begun."""
    _copying: torch.cuda.Stream | None = field(default=None, repr=False)

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from by itself (called by torch's loader)."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())

    def begin(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        """Start copying to the device, on a stream of its own; nothing waits for it here."""
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            self._there = self._copied(device)
        self._copying = stream

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images, and labels as int64, there: those of `begin`, once, or copied now."""
        there, self._there = self._there, None  # else a batch that is kept would keep the device's
        if there is None:
            return self._copied(device)
        if self._copying is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(self._copying)
            for tensor in there:
                tensor.record_stream(current)
        return there

    def _copied(self, device: torch.device) -> tuple[Tensor, Tensor]:
        images = self.images.to(device, non_blocking=True)
        return images, self.labels.to(device, non_blocking=True).long()


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches; on a GPU, the copy of each begins before the step on the one before it."""
    if device.type != "cuda":
        return batches
    return Ahead(batches, device, torch.cuda.Stream(device))


class Ahead(Iterator[Batch]):
    """Begins the copy of a batch when the one before it is given out.

    What goes wrong on reading a batch is raised in its turn, after the batches before it.
    """

    def __init__(
        self, batches: Iterator[Batch], device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self.batches, self.device, self.stream = batches, device, stream
        self._next: Batch | Exception | None = None

    def __next__(self) -> Batch:
        current = self._begun() if self._next is None else self._next
        self._next = current if isinstance(current, Exception) else self._begun()
        if isinstance(current, Exception):
            raise current
        return current

    def _begun(self) -> Batch | Exception:
        try:
            batch = next(self.batches)
        except Exception as error:
            return error
        batch.begin(self.device, self.stream)
        return batch


@dataclass(frozen=True)
class CropSource:
    """A dataset that crops are drawn from, its labels in the model's class ids."""

    dataset: Dataset
    class_map: ClassMap
    sampler: RareClassSampler | ShuffledSampler

    def draw(
        self, rng: np.random.Generator, seed: int, position: int, attempt: int
    ) -> tuple[int, int | None]:
        """(index of an image, class that its crop should show or None).

        position: crops of this source before this one. attempt: unreadable images before it.
        """
        if isinstance(self.sampler, RareClassSampler):
            return self.sampler.draw(rng)
        if attempt:  # another image takes the place of an unreadable one
            return int(rng.integers(self.sampler.size)), None
        return self.sampler.index_at(seed, position), None


def unread(dataset: Dataset, index: int) -> tuple[np.ndarray | Picture, np.ndarray, str]:
    """A sample as (image, label, name), the image left in its file where the dataset allows it."""
    path = dataset.image_file(index)
    picture = None if path is None else open_picture(path)
    if picture is not None:
        label = dataset.label(index)
        if label.shape == picture.shape[:2]:
            return picture, label, dataset.name(index)
    sample = dataset[index]
    return sample.image, sample.label, sample.name


@dataclass(eq=False)
class _Crops(TorchDataset["Crop | MFuserError"]):
    """Crop number `slot` of the whole run; depends on (seed, slot) alone."""

    sources: Sequence[CropSource]
    mixture: Mixture
    augmentation: Augmentation
    seed: int
    skip_unreadable: bool

    def __getitem__(self, slot: int) -> Crop | MFuserError:
        # Raised in a worker process, it would arrive with a traceback as its message.
        try:
            return self._crop(slot)
        except MFuserError as error:
            return error

    def _crop(self, slot: int) -> Crop:
        which, position = self.mixture.at(slot)
        source = self.sources[which]
        rng = sample_rng(self.seed, slot)
        skipped: list[str] = []
        for attempt in range(TRIES):
            index, wanted = source.draw(rng, self.seed, position, attempt)
            drawn = rng.bit_generator.state
            try:
                found, raw, name = unread(source.dataset, index)
                mapped = source.class_map.to_bytes(raw, name)
                image, label = self.augmentation(found, mapped, rng, wanted, name)
            except UnreadableImage:
                if not self.skip_unreadable:
                    raise
                skipped.append(source.dataset.name(index))
                # The pixels may be found unreadable after the crop is drawn.
                rng.bit_generator.state = drawn
                continue
            return (
                torch.from_numpy(image).permute(2, 0, 1).contiguous(),
                torch.from_numpy(label),
                skipped,
                name,
            )
        raise DataError(f"{TRIES} images in a row were unreadable, {skipped[-1]} among them")


class TrainingStream:
    """A batch for each of the steps; it depends on the seed alone."""

    def __init__(
        self, crops: _Crops, slots: _Slots, workers: int, prefetch: int = 2, pinned: bool = False
    ) -> None:
        self.crops = crops
        self.loader: DataLoader[Crop | MFuserError] = DataLoader(
            crops,
            batch_sampler=slots,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_start_worker,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pinned,
            # One pass is the whole training, so that they live as long without this.
            persistent_workers=False,
        )

    def first(self, source: int, count: int) -> Iterator[int]:
        """The numbers of a source's first crops."""
        return islice(self.crops.mixture.numbers(source), count)

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError for the first image that cannot be used, when its turn comes, and for a
        worker that was killed."""
        batches = self._started()
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                if not self._worker_died(error):
                    raise
                raise DataError(
                    "a data-loader worker was killed, as the system does when memory (or shared "
                    "memory) runs out; lower workers (--set-recipe workers=1) or batch_size"
                ) from error
            if batch is None:
                return
            if isinstance(batch, MFuserError):
                raise batch
            yield batch

    def _worker_died(self, error: Exception) -> bool:
        """Whether a worker is gone: torch has noticed, or a batch it had announced cannot be
        fetched from it any more."""
        # "Caught …": by a worker that lives.
        if not self.loader.num_workers or str(error).startswith("Caught "):
            return False
        gone = ConnectionError, EOFError, FileNotFoundError
        said = "DataLoader worker" in str(error) or "Pin memory thread exited" in str(error)
        return said or isinstance(error, gone)

    def _started(self) -> Iterator[Batch | MFuserError]:
        if not self.loader.num_workers:
            return iter(self.loader)
        # OpenCV's threads do not survive the fork, and the worker would wait for them forever.
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        try:
            return iter(self.loader)
        finally:
            cv2.setNumThreads(threads)
            # torch's handler would throw in the middle of a step, whose weights are then neither
            # the old nor the new ones; the loader itself notices within seconds.
            if handler is not None:
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(signal.SIGCHLD, handler)


@dataclass
class _Slots:
    """The numbers of every step's crops that are this process's share."""

    steps: range
    batch_size: int
    rank: int
    world: int

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def training_stream(
    sources: Sequence[CropSource],
    augmentation: Augmentation,
    *,
    shares: Sequence[float] = (1.0,),
    seed: int,
    steps: int,
    batch_size: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    pinned: bool = False,
    skip_unreadable: bool = False,
) -> TrainingStream:
    """Augmented crops of the sources, in the model's class ids, from step `start` to the last.

    shares: of each source. rank, world: this process takes its share of every step's crops.
    prefetch: batches that each worker reads ahead. pinned: in memory that a GPU copies from.
    """
    crops = _Crops(sources, Mixture(shares, seed), augmentation, seed, skip_unreadable)
    slots = _Slots(range(start, steps), batch_size, rank, world)
    return TrainingStream(crops, slots, workers, prefetch, pinned)


def _collate(items: list[Crop | MFuserError]) -> Batch | MFuserError:
    crops: list[Crop] = []
    for item in items:
        if isinstance(item, MFuserError):
            return item
        crops.append(item)
    images, labels, skipped, names = zip(*crops, strict=True)
    unreadable = [name for one in skipped for name in one]
    return Batch(torch.stack(images), torch.stack(labels), unreadable, list(names))


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole group, a scheduler's signal the whole job; the first process finishes
    # its step and ends the others.
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # SIGTERM may also be from the first process, where this one hangs
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(HANGING))
    torch.set_num_threads(1)
    cv2.setNumThreads(1)  # where workers are not forked, they do not have it from `_started`
