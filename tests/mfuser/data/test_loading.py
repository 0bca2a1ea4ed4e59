"""The stream of training crops, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mfuser import IGNORE, Dataset, Registry, Sample
from mfuser.data.images import read_image
from mfuser.data.loading import (
    Ahead,
    Batch,
    ClassMap,
    CropSource,
    TrainingStream,
    copied_ahead,
    training_stream,
)
from mfuser.data.sampling import ShuffledSampler
from mfuser.data.transforms import Augmentation, AugmentationSpec
from mfuser.errors import DataError


def stream(tiny: Registry, workers: int) -> TrainingStream:
    dataset = tiny.dataset("toy").build(None, "train")
    classes = ClassMap(dataset, tiny.pairing("plain").classes)
    augmentation = Augmentation(AugmentationSpec(), (64, 96))
    source = CropSource(dataset, classes, ShuffledSampler(len(dataset)))
    return training_stream([source], augmentation, seed=0, steps=2, batch_size=1, workers=workers)


def raising(error: Exception) -> Iterator[None]:
    raise error
    yield


GONE = [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    RuntimeError("Pin memory thread exited unexpectedly"),
    # Of a batch that it had announced, and whose memory it would have handed over.
    ConnectionResetError(104, "Connection reset by peer"),
    FileNotFoundError(2, "No such file or directory"),
    EOFError(),
]


@pytest.mark.parametrize("error", GONE, ids=lambda e: type(e).__name__)
def test_a_worker_that_is_gone_is_one_sentence(
    tiny: Registry, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(DataLoader, "__iter__", lambda _: raising(error))
    with pytest.raises(DataError, match="a data-loader worker was killed"):
        list(stream(tiny, workers=1))


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (ConnectionResetError("of a dataset that reads from a server"), 0),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback …"), 1),
    ],
)
def test_what_a_dataset_raises_is_not_taken_for_that(
    tiny: Registry, monkeypatch: pytest.MonkeyPatch, error: Exception, workers: int
) -> None:
    monkeypatch.setattr(DataLoader, "__iter__", lambda _: raising(error))
    with pytest.raises(type(error)):
        list(stream(tiny, workers))


class Files(Dataset):
    """PNG and JPEG images of one size, a truncated one among them; labels from their index."""

    classes = ("a", "b")
    class_ids = (0, 1)

    def __init__(self, folder: Path, in_part: bool) -> None:
        self.paths, self.in_part = sorted(folder.iterdir()), in_part

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        label = self.label(index).astype(np.int64)
        return Sample(read_image(self.paths[index]), label, self.name(index))

    def name(self, index: int) -> str:
        return self.paths[index].name

    def label(self, index: int) -> np.ndarray:
        label = np.random.default_rng(index).integers(0, 3, (90, 120), dtype=np.uint8)
        return np.where(label == 2, np.uint8(IGNORE), label)

    def image_file(self, index: int) -> Path | None:
        return self.paths[index] if self.in_part else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("a.png", "b.png", "c.jpg", "d.jpg", "e.png", "f.png")):
        image = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
        if name == "b.png":
            image = image.convert("P")
        image.save(folder / name)
        if k in (3, 5):
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[: len(data) // 2])
    return folder


def crops_of(folder: Path, in_part: bool, workers: int = 0, prefetch: int = 2) -> list[Batch]:
    dataset = Files(folder, in_part)
    source = CropSource(dataset, ClassMap(dataset, ("b", "a")), ShuffledSampler(len(dataset)))
    options = {"seed": 3, "steps": 9, "batch_size": 2, "skip_unreadable": True}
    augmentation = Augmentation(AugmentationSpec(), (48, 64))
    return list(
        training_stream([source], augmentation, workers=workers, prefetch=prefetch, **options)
    )


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and (a.names, a.skipped) == (b.names, b.skipped)
        for a, b in zip(one, other, strict=True)
    )


def test_images_read_in_part_give_the_same_crops(folder: Path) -> None:
    whole = crops_of(folder, in_part=False)
    assert same(whole, crops_of(folder, in_part=True))
    skipped = {name for batch in whole for name in batch.skipped}
    assert skipped == {"d.jpg", "f.png"}


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 3)])
def test_workers_and_what_they_read_ahead_change_no_crop(
    folder: Path, workers: int, prefetch: int
) -> None:
    assert same(crops_of(folder, True), crops_of(folder, True, workers, prefetch))


def test_labels_are_bytes_until_they_are_on_the_device(folder: Path) -> None:
    batch = crops_of(folder, in_part=True)[0]
    assert batch.images.dtype == batch.labels.dtype == torch.uint8
    images, labels = batch.to(torch.device("cpu"))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(labels, batch.labels.long())


def test_a_label_of_an_unknown_value_is_refused_by_name(folder: Path) -> None:
    dataset = Files(folder, in_part=True)
    class_map = ClassMap(dataset, ("b", "a"))
    for dtype in (np.uint8, np.int64):
        assert class_map.to_bytes(np.array([[0, 1, IGNORE]], dtype), "x").tolist() == [[1, 0, 255]]
        with pytest.raises(DataError, match="^x: label 2 is neither a train id"):
            class_map.to_bytes(np.array([[0, 2, IGNORE]], dtype), "x")


def test_the_copy_of_a_batch_begins_a_batch_earlier(folder: Path) -> None:
    """Without a GPU's stream, whose part here is to be asynchronous."""
    device, begun = torch.device("cpu"), []
    batches = crops_of(folder, in_part=True)[:3]

    def read() -> Iterator[Batch]:
        for k, batch in enumerate(batches):
            begun.append(k)
            yield batch
        raise DataError("the fourth is damaged")

    ahead = Ahead(read(), device, None)
    for k, batch in enumerate(batches):
        assert next(ahead) is batch
        assert begun == list(range(min(k + 2, 3)))
        copied = batch._there
        assert copied is not None and batch.to(device) is copied
        assert batch._there is None and torch.equal(batch.to(device)[1], copied[1])
    for _ in range(2):
        with pytest.raises(DataError, match="the fourth is damaged"):
            next(ahead)
    assert list(Ahead(iter(batches), device, None)) == batches
    assert copied_ahead(source := iter(batches), device) is source
