"""Windows in batches, as many as there is memory for; a GPU's memory is played by numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mfuser.errors import MFuserError
from mfuser.model import window_batch
from mfuser.model.sliding_window import Sliding, sliding_window
from mfuser.model.window_batch import MOST, Windows, fitting

WINDOW = (8, 12)


class Card:
    """A device on which each crop takes so many bytes, and of which so many are free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: int, free: int) -> None:
        self.each, self.free, self.sizes = each, free, []
        card = self

        class Played(window_batch.Memory):
            def __enter__(self) -> None:
                pass

            def __exit__(self, *_: object) -> None:
                self.taken = card.each * card.sizes[-1]

            def free(self) -> int:
                return card.free

        monkeypatch.setattr(window_batch.Memory, "of", lambda device: Played(device))

    sizes: list[int]

    def scores(self, crops: Tensor) -> Tensor:
        if len(crops) * self.each > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(crops))
        return crops.cumsum(-1)


def test_free_memory_says_how_many() -> None:
    assert fitting(100, 1000) == 8  # four fifths of it
    assert fitting(100, 0) == 1 and fitting(1000, 100) == 1
    assert fitting(0, 1e12) == MOST and fitting(1, 1e12) == MOST


@pytest.mark.parametrize("images, sizes", [(1, [1, 5, 5, 4]), (2, [2, 4, 4, 4, 4, 4, 4, 4])])
def test_the_first_window_is_measured(
    monkeypatch: pytest.MonkeyPatch, images: int, sizes: list[int]
) -> None:
    card = Card(monkeypatch, each=100, free=640)
    pixels = torch.rand(images, 3, 20, 32)  # 3 x 5 windows
    expected = sliding_window(lambda crops: crops.cumsum(-1), pixels, WINDOW, 6)
    windows = Windows("auto")
    assert torch.allclose(sliding_window(card.scores, pixels, WINDOW, 6, windows), expected)
    assert card.sizes == sizes
    card.sizes.clear()
    sliding_window(card.scores, pixels, WINDOW, 6, windows)
    assert card.sizes[0] == sizes[1]  # known from the first image


def test_less_memory_than_before_halves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, each=100, free=1000)
    pixels = torch.rand(1, 3, 20, 32)
    windows = Windows("auto")
    expected = sliding_window(card.scores, pixels, WINDOW, 6, windows)
    assert card.sizes == [1, 8, 6]
    card.sizes.clear()
    card.free = 350  # another program took the rest
    assert torch.equal(sliding_window(card.scores, pixels, WINDOW, 6, windows), expected)
    assert card.sizes == [2] * 7 + [1]
    card.free = 50
    with pytest.raises(torch.OutOfMemoryError):
        sliding_window(card.scores, pixels, WINDOW, 6, windows)
    card.free = 500
    with pytest.raises(torch.OutOfMemoryError):  # who gives a number gets that number
        sliding_window(card.scores, pixels, WINDOW, 6, 6)


@pytest.mark.parametrize("small, sizes", [(2 * 8 * 12, [2] * 15), (8 * 8 * 12, [8] * 3 + [6])])
def test_small_windows_go_together_where_memory_cannot_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, small: int, sizes: list[int]
) -> None:
    found: list[int] = []

    def scores(crops: Tensor) -> Tensor:
        found.append(len(crops))
        return crops.exp()

    monkeypatch.setattr(window_batch, "SMALL", small)
    pixels = torch.rand(2, 3, 20, 32)
    together = sliding_window(scores, pixels, WINDOW, 6, "auto")
    assert found == sizes
    assert torch.equal(together, sliding_window(scores, pixels, WINDOW, 6))


@pytest.mark.parametrize("wrong", [0, -3, 2.0, True, "many", None])
def test_what_is_no_number_of_windows(wrong: Any) -> None:
    with pytest.raises(MFuserError, match="window_batch = .*: give a positive integer"):
        Sliding(None, wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_asked() -> None:
    sizes: list[int] = []

    def scores(crops: Tensor) -> Tensor:
        sizes.append(len(crops))
        return crops.cumsum(-1)

    pixels = torch.rand(1, 3, 20, 32, device="cuda")
    found = sliding_window(scores, pixels, WINDOW, 6, "auto")
    assert sizes == [1, 14]
    assert torch.allclose(found, sliding_window(scores, pixels, WINDOW, 6))
