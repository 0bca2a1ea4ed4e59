"""Training on bad data and bad settings: one sentence, and nothing that was there is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mfuser import DataError, Registry
from mfuser.data.images import UnreadableImage
from mfuser.data.sampling import ShuffledSampler
from mfuser.engine import checkpoints
from mfuser.engine.diagnose import DIVERGED
from mfuser.engine.train import Diverged, Trainer, train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(folder / checkpoints.FINAL).model


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


def test_a_loss_that_is_no_number(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    run = begin("plain", "lr=1e30", "min_lr=0", "save_every=1000")
    with pytest.raises(Diverged, match=r"the loss is nan at step \d .*lower lr = 1e\+30"):
        train(tiny, run, tmp_path / "r")
    # Nothing was saved to go on from, but what explains it stays.
    assert (tmp_path / "r" / "run.json").is_file() and (tmp_path / "r" / DIVERGED).is_file()
    assert not (tmp_path / "r" / checkpoints.LAST).exists()


def test_weights_that_are_no_numbers_are_not_saved(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._step

    def poisoned(self: Trainer, step: int, batches: Any) -> Any:
        losses = original(self, step, batches)
        if step == 2:
            with torch.no_grad():
                next(iter(self.names)).fill_(float("nan"))
        return losses

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(Diverged, match="no longer finite after step 3.*is from before"):
        train(tiny, begin("plain", "save_every=1"), tmp_path / "r")
    last = checkpoints.read(tmp_path / "r" / checkpoints.LAST)
    assert last.step == 2 and all(t.isfinite().all() for t in last.model.values())


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], Any]], None]]:
    """Changes what the rendered dataset gives for some of its images."""
    from mfuser_plugins.datasets.streets import Streets

    original = Streets.__getitem__

    def spoil(change: Callable[[int], Any]) -> None:
        def item(self: Streets, index: int) -> Any:
            changed = change(index) if self.split == "train" else None
            if isinstance(changed, Exception):
                raise changed
            sample = original(self, index)
            return sample if changed is None else changed(sample)

        monkeypatch.setattr(Streets, "__getitem__", item)

    yield spoil


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_the_run_and_costs_no_step(
    tiny: Registry, begin: Any, tmp_path: Path, spoilt: Any, workers: int
) -> None:
    run = begin("plain", "steps=6", "save_every=1000", f"workers={workers}")
    train(tiny, run, tmp_path / "whole")
    order = [ShuffledSampler(6).index_at(0, n) for n in range(6)]
    bad = order[3]
    spoilt(lambda i: UnreadableImage("street.png cannot be read") if i == bad else None)
    with pytest.raises(UnreadableImage) as caught:
        train(tiny, run, tmp_path / "r")
    assert str(caught.value) == (
        "street.png cannot be read (3 steps are saved; fix it and --resume)"
    )
    spoilt(lambda i: None)
    train(tiny, run, tmp_path / "r", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "r"))


def test_a_bad_image_in_the_first_step_leaves_nothing(
    tiny: Registry, begin: Any, tmp_path: Path, spoilt: Any
) -> None:
    spoilt(lambda i: UnreadableImage("street.png cannot be read"))
    with pytest.raises(UnreadableImage, match="^street.png cannot be read$"):
        train(tiny, begin(), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    with pytest.raises(DataError, match="20 images in a row were unreadable"):
        train(tiny, begin("plain", "on_bad_image=skip"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_bad_images_are_skipped_and_named(
    tiny: Registry, begin: Any, tmp_path: Path, spoilt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ShuffledSampler(6).index_at(0, 1)
    spoilt(lambda i: UnreadableImage("x") if i == bad else None)
    train(tiny, begin("plain", "on_bad_image=skip"), tmp_path / "r")
    assert (tmp_path / "r" / checkpoints.FINAL).exists()
    assert f"skipped, unreadable: game_train_0_{bad:05d}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: type(s)(s.image, s.label + 30, s.name),
            r"game_train_0_\d+: label \d+ is neither",
        ),
        (lambda s: type(s)(s.image, s.label - 300, s.name), r"label -\d+ is neither"),
        (lambda s: type(s)(s.image, s.label[:-1], s.name), r"the label is 96x63, the image 96x64"),
        (
            lambda s: type(s)(s.image[:40], s.label[:40], s.name),
            r"game_train_0_\d+ is 40x96, smaller than the crop of 64x96",
        ),
    ],
)
def test_samples_that_cannot_be_used(
    tiny: Registry, begin: Any, tmp_path: Path, spoilt: Any, change: Any, message: str
) -> None:
    spoilt(lambda i: change)
    with pytest.raises(DataError, match=message):
        train(tiny, begin(), tmp_path / "r")
    assert not (tmp_path / "r").exists()
