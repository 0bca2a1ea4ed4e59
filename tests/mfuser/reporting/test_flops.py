"""One counter of FLOPs: multiply-adds twice, activations once, per module."""

from __future__ import annotations

import torch
from torch import nn

from mfuser.reporting.flops import count_flops


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.rest = nn.Sequential(nn.GELU(), nn.Linear(16, 4))


def laid_out() -> tuple[Two, torch.Tensor]:
    with torch.device("meta"):
        return Two(), torch.empty(3, 8)


def test_counts_of_modules_add_up() -> None:
    model, x = laid_out()
    model.forward = lambda x: model.rest(model.first(x))  # type: ignore[method-assign]
    counted = count_flops(lambda: model(x))
    assert counted is not None
    assert counted.below("Two.first") == 2 * 3 * 8 * 16
    assert counted.below("Two.rest") == 3 * 16 + 2 * 3 * 16 * 4
    assert counted.total == counted.below("Two.first") + counted.below("Two.rest")
    assert counted.added == 0 and counted.below("Two.nothing") == 0


def test_parts_that_are_called_piece_by_piece_are_counted() -> None:
    """As an encoder is, whose blocks are stepped."""
    model, x = laid_out()
    model.forward = lambda x: model.rest[1](model.first(x))  # type: ignore[method-assign]
    counted = count_flops(lambda: model(x))
    assert counted is not None and counted.below("Two.rest") == 2 * 3 * 16 * 4


def test_what_depends_on_values_is_not_counted() -> None:
    _, x = laid_out()
    assert count_flops(lambda: x[x > 0] @ x) is None
