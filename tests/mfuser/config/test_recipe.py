"""Recipes: what they refuse, and the rate at every step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mfuser import MFuserError, Registry, load_registry


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


def test_decays_of_tables_and_schedules() -> None:
    reg = Registry([("file.toml", {"recipe": {"r": {"steps": 10, "warmup": 0}}})])
    plain = reg.recipe("r", ["weight_decay=0.1"])
    assert (plain.base_decay, plain.decays) == (0.1, {})
    assert [plain.decay_at(0.1, s) for s in (0, 9)] == [0.1, 0.1]
    table = reg.recipe("r", ["weight_decay={default=0.2, decoder=0.1}"])
    assert (table.base_decay, table.decays) == (0.2, {"decoder": 0.1})
    dotted = reg.recipe("r", ["lr_scale.encoder.vfm.*.attn=2", "lr_scale.decoder=3"])
    assert dotted.lr_scale == {"encoder.vfm.*.attn": 2, "decoder": 3}
    falling = ["weight_decay=0.1", "min_weight_decay=0.02", "decay_schedule=linear"]
    linear = reg.recipe("r", falling)
    assert [linear.decay_at(0.1, s) for s in (0, 5)] == pytest.approx([0.1, 0.06])
    assert [linear.decay_at(d, 9) for d in (0.0, 0.01)] == [0.0, 0.01]  # below the floor: as it is
    cosine = reg.recipe("r", [*falling, "decay_schedule=cosine"])
    assert cosine.decay_at(0.1, 1) == pytest.approx(0.02 + 0.04 * (1 + math.cos(math.pi / 10)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weight_decay.decoder=1", 'weight_decay as a table needs "default"'),
        ("min_weight_decay=1", "min_weight_decay 1.0 is above weight_decay 1e-05"),
        ("lr_scale.decoder=-3", r"lr_scale\.decoder = -3: .*greater than or equal to 0"),
        ("lr_scale=3", r"lr_scale: takes a table such as { decoder = 10 }, not 3"),
        ("weight_decay=x", "weight_decay: takes a number or a table .* not 'x'"),
        ("sources=3", "sources: takes a list such as"),
        ("lr_ramp.decoder=[3,3]", r"lr_ramp: 'decoder' rises from step 3 to 3; it takes"),
        ("lr_ramp.decoder=[3,11]", "with begin < full and full at most steps = 10"),
        ("lr_ramp.decoder=3", r"lr_ramp\.decoder = 3"),
        ("layer_decay=1.5", r"layer_decay = 1\.5: .*less than or equal to 1"),
        ("decay_schedule=annealed", "'constant', 'linear' or 'cosine'"),
    ],
)
def test_rates_and_decays_that_are_refused(change: str, message: str) -> None:
    reg = Registry([("file.toml", {"recipe": {"r": {"steps": 10, "warmup": 0}}})])
    with pytest.raises(MFuserError, match=message) as caught:
        reg.recipe("r", [change])
    assert "\n" not in str(caught.value)


def test_the_recipe_of_a_pairing_is_that_of_what_it_extends(write_registry: Any) -> None:
    file = write_registry(
        '[pairing.a]\nextends = "lone"\n[pairing.b]\nextends = "a"\n[recipe.a]\nsteps = 1\n'
        '[pairing.demolition]\nextends = "lone"\n[pairing.loop]\nextends = "loop"'
    )
    registry = load_registry(file)
    names = ("a", "b", "lone", "tiny", "demolition", "loop", "demo-scratch")
    found = {name: registry.recipe_of(name) for name in names}
    # `lone` extends `plain`, which extends `tiny`.
    assert found == {"a": "a", "b": "a", "lone": "tiny", "tiny": "tiny", "demolition": "tiny",
                     "loop": "paper", "demo-scratch": "demo"}  # fmt: skip
