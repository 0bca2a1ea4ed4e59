"""Recipes: what they refuse, and the rate at every step."""

from __future__ import annotations

import math

import pytest

from mfuser import MFuserError, Registry


def test_recipes_hold_together() -> None:
    reg = Registry([("file.toml", {"recipe": {"r": {"steps": 10, "warmup": 2}}})])
    assert reg.recipe("r").rate(0) == pytest.approx(0.5)
    assert reg.recipe("r", ["schedule=constant"]).rate(9) == 1.0
    linear = reg.recipe("r", ["schedule=linear", "min_lr=0", "warmup=0"])
    assert [linear.rate(s) for s in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    poly = reg.recipe("r", ["lr=1e-2", "min_lr=1e-3", "warmup=0"])
    assert poly.rate(5) == pytest.approx(0.1 + 0.9 * 0.5**0.9)
    cosine = reg.recipe("r", ["schedule=cosine", "lr=1e-2", "min_lr=1e-3", "warmup=0"])
    assert [cosine.rate(s) for s in (0, 5)] == pytest.approx([1.0, 0.1 + 0.9 * 0.5])
    assert cosine.rate(1) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 10)) / 2)
    # mmcv's warm-up starts at the ratio itself, a step behind one that starts at 1 / warmup.
    late = reg.recipe("r", ["schedule=constant", "warmup=4", "warmup_ratio=0.2"])
    assert [late.rate(s) for s in (0, 1, 4)] == pytest.approx([0.2, 0.2 + 0.8 / 4, 1.0])
    for wrong, message in (
        ("warmup_ratio=1.5", "warmup_ratio = 1.5"),
        ("schedule=step", "schedule = 'step'"),
        ("warmup=10", "warmup of 10 steps does not end within steps = 10"),
        ("steps=0", "--set-recipe: steps = 0"),
        ("batch_size=0", "--set-recipe: batch_size = 0"),
        ("lr=nan", "lr = nan"),
        ("lr=inf", "lr = inf"),
        ("min_lr=1", "min_lr 1.0 is above lr"),
        ("seed=99999999999999999999", "seed = 99999999999999999999"),
        ("stride=[3]", r"one number or \[height, width\], not \[3\]"),
    ):
        with pytest.raises(MFuserError, match=message):
            reg.recipe("r", [wrong])
