"""One domain, image by image: read ahead, asked of the model, counted behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from mfuser.data.images import UnreadableImage
from mfuser.data.loading import ClassMap
from mfuser.engine.ahead import ahead, workers_of
from mfuser.engine.console import Console, Task
from mfuser.engine.decision import decide
from mfuser.engine.exhaustion import explained
from mfuser.engine.gallery import Gallery, panel
from mfuser.engine.metrics import Calibration, Confusion
from mfuser.engine.processes import Processes
from mfuser.errors import DataError, MFuserError, placed
from mfuser.inference import Inference
from mfuser.interfaces import IGNORE, Dataset
from mfuser.model.dgss import DGSSModel
from mfuser.reporting import draw

SMALLER = "test_size of the dataset in the registry; --device cpu where there is more memory"
"""Remedies when memory runs out."""
TOGETHER = 4
"""Images of one size that are segmented in one pass, where they are small."""
SCORES = 64 * 2**20
"""Bytes of scores above which images are segmented one by one."""


@dataclass
class Measured:
    """The result of one domain. confusion: (K, K) counts. pictures: rows of image, truth and
    prediction, with the image's index."""

    confusion: Confusion
    scored: tuple[int, ...]
    images: int
    skipped: list[str]
    pictures: list[tuple[int, list[np.ndarray]]]
    calibration: Calibration
    gallery: Gallery


@dataclass(frozen=True)
class Protocol:
    """Settings of a measurement, for every domain. limit: only the first so many images. workers:
    threads that read ahead; None: as many as there is room for."""

    inference: Inference
    limit: int | None
    skip_unreadable: bool
    workers: int | None = None


def measure(
    model: DGSSModel,
    dataset: Dataset,
    scored: tuple[int, ...],
    protocol: Protocol,
    group: Processes,
    *,
    pictures: int,
    label: str,
    text: Tensor | None = None,
    console: Console,
) -> Measured:
    """One domain; every process takes its share of the images, and all have the whole result.

    text: what `text_of` returned, where nothing has changed it since.
    """
    count = min(len(dataset), protocol.limit or len(dataset))
    drawn = set(np.linspace(0, count - 1, min(pictures, count), dtype=int).tolist())
    mine = _share_of(count, group.rank, group.count)
    with console.task(label, len(mine)) as task:
        share = _Share(model, dataset, scored, drawn, label, text)
        group.together(lambda: share.work(mine, protocol, group.accelerator.device, task))
    share.confusion.counts = np.sum(group.gathered([share.confusion.counts]), axis=0)
    calibration = Calibration()
    for _, sums in sorted(group.gathered(share.certainty), key=lambda entry: entry[0]):
        calibration.sums += sums  # in the order of the images: rounded alike whoever had them
    share.gallery.extend(group.gathered(share.gallery.scores), group.gathered(share.gallery.shown))
    if not share.confusion.counts.any():
        raise DataError(f"{label}: no pixel of its {count} images carries a scored class")
    # In the order of the images, whichever process had them.
    skipped = dict(sorted(group.gathered(share.skipped)))
    drawings = sorted(group.gathered(share.pictures), key=lambda drawing: drawing[0])
    return Measured(
        share.confusion,
        scored,
        count,
        list(skipped.values()),
        drawings,
        calibration,
        share.gallery,
    )


def _share_of(count: int, rank: int, world: int) -> list[int]:
    """The indices of a process's images: whole runs of TOGETHER, so that what goes through the
    model at once, and with it the last bits of the scores, is the same for any number of processes.
    """
    firsts = range(rank * TOGETHER, count, world * TOGETHER)
    return [i for first in firsts for i in range(first, min(first + TOGETHER, count))]


def text_of(model: DGSSModel) -> Tensor | None:
    """The class texts, computed once for all images: nothing changes them between these."""
    if model.encoder.vlm is None:
        return None
    with torch.no_grad():
        return model.text()


@dataclass(frozen=True)
class _Read:
    """One image of a domain. image: (H, W, 3) as it is stored. given: the same in the size that
    the model reads. truth: uint8 (H, W), the model's class ids, 255 where they do not count."""

    index: int
    name: str
    image: np.ndarray
    given: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class _Decided:
    """read, and of it prediction and confidence (H, W)."""

    read: _Read
    prediction: np.ndarray
    confidence: np.ndarray


class _Share:
    """One process's part of a domain; what it finds of single images goes with their index.

    Threads read ahead (`_read`), this one asks the model (`_decide`), another counts (`_count`).
    """

    def __init__(
        self,
        model: DGSSModel,
        dataset: Dataset,
        scored: tuple[int, ...],
        drawn: set[int],
        label: str,
        text: Tensor | None,
    ) -> None:
        self.model, self.dataset, self.scored = model, dataset, scored
        self.drawn, self.label, self.text = drawn, label, text
        self.class_map = ClassMap(dataset, model.classes)
        self.counting = np.full(256, IGNORE, np.uint8)
        self.counting[list(scored)] = scored
        self.table = draw.palette(model.classes)
        self.confusion = Confusion(len(model.classes))
        self.certainty: list[tuple[int, np.ndarray]] = []
        self.gallery = Gallery()
        self.skipped: list[tuple[int, str]] = []
        self.pictures: list[tuple[int, list[np.ndarray]]] = []

    def work(
        self, mine: Sequence[int], protocol: Protocol, device: torch.device, task: Task
    ) -> None:
        if self.text is None:
            self.text = text_of(self.model)
        workers = workers_of(protocol.workers)
        with ahead(mine, self._read, workers, TOGETHER) as read:
            batches = self._batches(zip(mine, read, strict=True), protocol.skip_unreadable)
            decided = (one for batch in batches for one in self._decide(batch, protocol, device))
            with ahead(decided, self._count, min(1, workers)) as counted:
                for done in counted:
                    done()
                    task.advance()

    def _read(self, index: int) -> _Read:
        sample = self.dataset[index]
        image, label = sample.image, sample.label
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{sample.name}: the label is {label.shape[1]}x{label.shape[0]}, the image "
                f"{image.shape[1]}x{image.shape[0]} (width x height): not equal"
            )
        truth = self.counting[self.class_map(label, sample.name)]
        return _Read(index, sample.name, image, test_scale(image, self.dataset.test_size), truth)

    def _batches(
        self, read: Iterable[tuple[int, Callable[[], _Read]]], skip: bool
    ) -> Iterator[list[_Read]]:
        """Consecutive images of one size, and of one run of TOGETHER, are segmented together."""
        batch: list[_Read] = []
        for index, result in read:
            try:
                one = result()
            except UnreadableImage:
                if not skip:
                    raise
                self.skipped.append((index, self.dataset.name(index)))
                continue
            full = len(batch) >= self._together(one)
            if batch and (
                full
                or batch[0].index // TOGETHER != one.index // TOGETHER
                or batch[0].image.shape != one.image.shape
            ):
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch

    def _together(self, read: _Read) -> int:
        height, width = read.given.shape[:2]
        scores: int = 4 * len(self.model.classes) * height * width  # float32
        return max(1, min(TOGETHER, SCORES // scores))

    def _decide(
        self, batch: list[_Read], protocol: Protocol, device: torch.device
    ) -> Iterator[_Decided]:
        inference, classes = protocol.inference, len(self.model.classes)
        try:
            with explained(inference, batch[0].given.shape[:2], classes, SMALLER):
                images = torch.from_numpy(np.stack([read.given for read in batch]))
                stack = images.permute(0, 3, 1, 2).to(device)
                scores = self.model.segment_by(inference, stack, text=self.text)
        except MFuserError as error:
            raise placed(error, f"{self.label}, {batch[0].name}") from error
        kind = self.model.decoder.scores
        decisions = [
            decide(one, read.truth.shape, self.scored, kind)
            for read, one in zip(batch, scores, strict=True)
        ]
        del scores  # before the next ones take their memory
        for read, (prediction, confidence) in zip(batch, decisions, strict=True):
            yield _Decided(read, prediction, confidence)

    def _count(self, one: _Decided) -> None:
        """In the order of the images."""
        read, prediction = one.read, one.prediction
        self.confusion.add(read.truth, prediction)
        calibration = Calibration()
        calibration.add(read.truth, prediction, one.confidence)
        self.certainty.append((read.index, calibration.sums))
        self.gallery.add(
            read.index,
            read.name,
            read.image,
            read.truth,
            prediction,
            self.scored,
            len(self.model.classes),
        )
        if read.index in self.drawn:
            self.pictures.append(
                (read.index, panel(read.image, read.truth, prediction, self.table))
            )


def test_scale(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize to fit (width, height) keeping the ratio, as mmsegmentation's keep_ratio does."""
    if size is None:
        return image
    height, width = image.shape[:2]
    factor = min(max(size) / max(height, width), min(size) / min(height, width))
    to = (int(width * factor + 0.5), int(height * factor + 0.5))
    return image if to == (width, height) else cv2.resize(image, to, interpolation=cv2.INTER_LINEAR)
