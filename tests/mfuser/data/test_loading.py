"""The stream of training crops, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader

from mfuser import Registry
from mfuser.data.loading import ClassMap, CropSource, TrainingStream, training_stream
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
