from __future__ import annotations

from typing import Any

import pytest
import torch

from mfuser import build_model
from mfuser_plugins.tuning.fada import Fada, FadaSpec, bands, instance_norm, joined

GRIDS = pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1), (2, 7)])


@GRIDS
def test_bands_join_to_what_they_were(grid: tuple[int, int]) -> None:
    maps = torch.randn(2, *grid, 3)
    four = bands(maps)
    assert four.shape == (4, 2, -(-grid[0] // 2), -(-grid[1] // 2), 3)
    torch.testing.assert_close(joined(four, grid), maps)


def test_bands_are_haars() -> None:
    """LL is twice the mean; the others see steps across columns, across rows, and both."""
    flat = torch.ones(1, 2, 2, 1)
    columns = torch.tensor([[1.0, -1.0], [1.0, -1.0]]).view(1, 2, 2, 1)
    rows, both = columns.transpose(1, 2), columns * columns.transpose(1, 2)
    for k, maps in enumerate((flat, columns, rows, both)):
        expected = torch.zeros(4)
        expected[k] = 2
        assert torch.equal(bands(maps).flatten(), expected)


def module(width: int = 8) -> Fada:
    made = Fada(FadaSpec(tokens=4, rank=2), 2, width)
    with torch.no_grad():
        made.low.scale.fill_(0.5)
        made.high.scale.fill_(0.5)
    return made


@GRIDS
def test_bands_are_refined_by_tokens_of_their_own(grid: tuple[int, int]) -> None:
    made, patches = module(), torch.randn(2, grid[0] * grid[1], 8)
    four = bands(patches.unflatten(1, grid)).flatten(2, 3)  # (4, B, T', D)
    offsets = []
    for k in range(4):
        branch, x = (made.low, four[0]) if k == 0 else (made.high, instance_norm(four[k]))
        tokens = branch.tokens(1)
        share = (x @ tokens.T / 8**0.5).softmax(-1)[..., 1:]
        offsets.append(0.5 * branch.map_patches(x + share @ branch.map_tokens(tokens[1:])))
    half = (-(-grid[0] // 2), -(-grid[1] // 2))
    change = joined(torch.stack(offsets).unflatten(2, half), grid)
    expected = patches + change.flatten(1, 2)
    torch.testing.assert_close(made(1, patches, grid), expected)


def test_the_style_of_high_frequencies_is_taken_out() -> None:
    """Gain and offset of a high band's channels change nothing of what is added."""
    made, grid = module(), (8, 8)
    four = torch.randn(4, 1, 4, 4, 8)
    other = four.clone()
    other[1:] = 3 * other[1:] + 0.5
    added = [
        made(0, patches, grid) - patches
        for patches in (joined(bands_, grid).flatten(1, 2) for bands_ in (four, other))
    ]
    torch.testing.assert_close(added[0], added[1], rtol=1e-3, atol=1e-4)
    normed = instance_norm(torch.randn(2, 50, 3) * 4 + 1)
    torch.testing.assert_close(normed.mean(1), torch.zeros(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.var(1, correction=0), torch.ones(2, 3), rtol=0, atol=1e-4)


def test_it_trains_with_others(tiny: Any) -> None:
    model = build_model("tiny", tiny, tuning={"name": "fada", "tokens": 4, "rank": 2})
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".refiner." in n}
    assert {n.split(".")[1] for n in before} == {"vfm", "vlm"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = model(torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96)))
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    now = dict(model.named_parameters())
    same = [n for n, p in before.items() if torch.equal(now[n], p)]
    assert not same
