"""FADA against its equations as they follow from the authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfuser import MFuserError, build_model
from mfuser_plugins.tuning.fada import Fada, FadaSpec, bands, instance_norm, of_channels, spread

GRIDS = pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1), (2, 7)])


def test_bands_are_haars() -> None:
    """LL is twice the mean; the others see steps across columns, across rows, and both."""
    flat = torch.ones(1, 2, 2, 1)
    columns = torch.tensor([[1.0, -1.0], [1.0, -1.0]]).view(1, 2, 2, 1)
    rows, both = columns.transpose(1, 2), columns * columns.transpose(1, 2)
    for k, maps in enumerate((flat, columns, rows, both)):
        expected = torch.zeros(4)
        expected[k] = 2
        assert torch.equal(bands(maps).flatten(), expected)


@GRIDS
def test_every_patch_takes_a_quarter_of_each_band(grid: tuple[int, int]) -> None:
    four = bands(torch.randn(2, *grid, 8))
    assert four.shape == (4, 2, -(-grid[0] // 2), -(-grid[1] // 2), 8)
    found = spread(four[1:], grid)
    assert found.shape == (2, grid[0] * grid[1], 6)
    for row in range(grid[0]):
        for column in range(grid[1]):
            part = 2 * (row % 2) + column % 2
            expected = four[1:, :, row // 2, column // 2, 2 * part : 2 * part + 2]
            assert torch.equal(
                found[:, row * grid[1] + column], expected.transpose(0, 1).flatten(1)
            )


def module(width: int = 8, **options: Any) -> Fada:
    made = Fada(FadaSpec(**{"tokens": 4, "rank": 2, **options}), 2, width)
    with torch.no_grad():
        made.scale.fill_(0.5)
    return made


@GRIDS
def test_bands_are_refined_by_tokens_of_their_own(grid: tuple[int, int]) -> None:
    made, patches = module(), torch.randn(2, grid[0] * grid[1], 8)
    four = bands(patches.unflatten(1, grid))
    offsets = []
    for branch, parts in ((made.low, four[:1]), (made.high, four[1:])):
        x, tokens = spread(parts, grid), branch.tokens(1)
        alike = x @ tokens.T
        if branch is made.high:
            alike = torch.nn.functional.instance_norm(alike)
        share = (alike / 8**0.5).softmax(-1)[..., 1:]
        offsets.append(branch.map_patches(x + share @ branch.map_tokens(tokens[1:])))
    expected = patches + 0.5 * torch.cat(offsets, -1)
    torch.testing.assert_close(made(1, patches, grid), expected)


def test_bands_of_channels_are_those_of_the_published_code() -> None:
    """Its steps, written out: tokens reshaped into maps, four filters of stride 2, and back."""
    patches = torch.randn(2, 16, 16)  # as there: as many patches as channels, both of them 4 x 4
    low, high = torch.tensor([1.0, 1.0]) / 2**0.5, torch.tensor([1.0, -1.0]) / 2**0.5
    filters = torch.stack([torch.outer(a, b) for a, b in
                           ((low, low), (low, high), (high, low), (high, high))])  # fmt: skip
    maps = patches.transpose(0, 1).reshape(2, 16, 4, 4)
    four = [
        torch.nn.functional.conv2d(maps, f.expand(16, 1, 2, 2), stride=2, groups=16)
        .reshape(16, 2, 4)
        .transpose(0, 1)
        for f in filters
    ]
    torch.testing.assert_close(of_channels(patches), torch.stack(four))
    made = module(16, transform="channels")
    low_part = made.low(1, four[0])
    high_part = made.high(1, torch.cat(four[1:], -1))
    expected = patches + 0.5 * torch.cat([low_part, high_part], -1)
    torch.testing.assert_close(made(1, patches, (4, 4)), expected)
    for width in (8, 32):
        with pytest.raises(MFuserError, match=f"square map, and {width} is no square number"):
            module(width, transform="channels")


def test_the_norm_is_torchs() -> None:
    x = torch.randn(2, 50, 7) * 4 + 1
    torch.testing.assert_close(instance_norm(x), torch.nn.functional.instance_norm(x))


def test_size_of_the_published_code() -> None:
    """As its class counts with Rein's options: 100 tokens of rank 16 in 24 blocks of DINOv2-L."""
    with torch.device("meta"):
        made = Fada(FadaSpec(), 24, 1024)
        assert made.link(100, 256)
    low, high = 256, 768
    maps = 2 * sum(width * width + width for width in (low, high))
    tokens = 24 * (2 * 100 * 16 + 16 * (low + high))
    queries = low * 256 + 256 + 3 * 256 * 256 + 256
    assert sum(p.numel() for p in made.parameters()) == maps + tokens + 1 + queries == 2_045_441


def test_low_tokens_make_the_queries() -> None:
    made = module()
    assert made.link(4, 6) and made.each is not None and made.join is not None
    each = torch.stack([made.each(made.low.tokens(i)) for i in range(2)])
    expected = made.join(torch.cat([each.max(0).values, each.mean(0), each[1]], -1))
    torch.testing.assert_close(made.queries(), expected)
    assert not module(link=False).link(7, 4)
    with pytest.raises(MFuserError, match="tuning 'fada' has 4 tokens, and the decoder 7 queries"):
        made.link(7, 6)
    with pytest.raises(MFuserError, match="10 channels are not a multiple of 4"):
        module(10)


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
