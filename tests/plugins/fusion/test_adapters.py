"""The contract of every fusion adapter, and table 3's parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfuser import FusionSpec, MFuserError, TokenShape
from mfuser.plugins.discovery import components

SPECS: dict[str, Any] = {
    name: spec for name, spec in components("fusion").items() if name != "none"
}
SMALL: dict[str, dict[str, Any]] = {
    "bi_deformable_attention": {"heads": 1, "points": 2},
    "cross_attention": {"tokens": 3, "rank": 2},
    "mvfuser": {"state_size": 2},
    "separate_mvfuser": {"state_size": 2},
}
EVERY = pytest.mark.parametrize("name", SPECS)
VFM, VLM = TokenShape(24, (2, 3), 1), TokenShape(16, (3, 4), 0)


def small(name: str, **options: Any) -> FusionSpec:
    return SPECS[name](**SMALL.get(name, {}), **options)


def tokens(shape: TokenShape | None, batch: int = 2) -> torch.Tensor | None:
    return None if shape is None else torch.randn(batch, shape.num_tokens, shape.embed_dim)


def grid(shape: TokenShape | None) -> tuple[int, int] | None:
    return None if shape is None else shape.grid


towers = st.builds(
    TokenShape,
    embed_dim=st.integers(1, 12).map(lambda n: 2 * n),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_prefix_tokens=st.integers(0, 5),
)


@EVERY
@settings(max_examples=15, deadline=None)
@given(vfm=towers | st.none(), vlm=towers | st.none(), batch=st.integers(1, 2))
def test_any_towers(name: str, vfm: TokenShape | None, vlm: TokenShape | None, batch: int) -> None:
    if vfm is None and vlm is None:
        vfm = TokenShape(8, (2, 2), 1)
    if not SPECS[name].single_tower:
        vfm, vlm = vfm or vlm, vlm or vfm
    adapter = small(name).build(vfm, vlm)
    assert adapter is not None
    streams = tokens(vfm, batch), tokens(vlm, batch)
    for stream, offset in zip(streams, adapter(*streams, grid(vfm), grid(vlm)), strict=True):
        if stream is None:
            assert offset is None
        else:
            assert offset is not None and offset.shape == stream.shape
            assert offset.isfinite().all()


@EVERY
def test_starts_near_zero_and_learns(name: str) -> None:
    adapter = small(name).build(VFM, VLM)
    assert adapter is not None
    streams = tokens(VFM), tokens(VLM)
    offsets = adapter(*streams, VFM.grid, VLM.grid)
    # Tokens are standard normal; the gain of 0.001 leaves a few thousandths of that.
    assert all(0 < offset.abs().max() < 0.02 for offset in offsets)
    # Deformable attention starts blind to its queries, so that they learn from the second step on.
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        offsets = adapter(*streams, VFM.grid, VLM.grid)
        sum((offset * torch.randn_like(offset)).sum() for offset in offsets).backward()
        optimizer.step()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@EVERY
def test_repeats_itself_only_when_evaluated(name: str) -> None:
    adapter = small(name, dropout=0.5).build(VFM, VFM)
    assert adapter is not None
    streams = tokens(VFM), tokens(VFM)
    first, again = adapter(*streams, VFM.grid, VFM.grid), adapter(*streams, VFM.grid, VFM.grid)
    assert not torch.equal(first[0], again[0]) and not torch.equal(first[1], again[1])
    adapter.eval()
    first, again = adapter(*streams, VFM.grid, VFM.grid), adapter(*streams, VFM.grid, VFM.grid)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@EVERY
def test_grids_default_to_the_declared_ones(name: str) -> None:
    adapter = small(name).build(VFM, VLM)
    assert adapter is not None
    adapter.eval()
    streams = tokens(VFM), tokens(VLM)
    for told, untold in zip(adapter(*streams, VFM.grid, VLM.grid), adapter(*streams), strict=True):
        assert torch.equal(told, untold)


@pytest.mark.parametrize(
    ("name", "exchange"),
    [
        ("mvfuser", True),
        ("self_attention_concat", True),
        ("self_attention_separate", True),
        ("bi_deformable_attention", True),
        ("separate_mvfuser", False),
        ("convolution", False),
        ("cross_attention", False),
    ],
)
def test_which_adapters_let_the_encoders_exchange_tokens(name: str, exchange: bool) -> None:
    adapter = small(name).build(VFM, VLM)
    assert adapter is not None
    vfm, vlm = tokens(VFM), tokens(VLM)
    assert vfm is not None
    vfm.requires_grad_()
    _, offset = adapter(vfm, vlm, VFM.grid, VLM.grid)
    offset.square().sum().backward()
    assert (vfm.grad is not None and bool(vfm.grad.abs().max() > 0)) == exchange


@pytest.mark.parametrize("name", ["self_attention_concat", "self_attention_separate"])
def test_heads_that_do_not_divide(name: str) -> None:
    with pytest.raises(MFuserError, match=f"{name}: 5 heads .* width of 16; use heads = 4"):
        SPECS[name](heads=5).build(VFM, VLM)


@pytest.mark.parametrize("name", ["convolution", "separate_mvfuser", "mvfuser"])
def test_odd_widths(name: str) -> None:
    odd = TokenShape(7, (2, 2), 0)
    with pytest.raises(MFuserError, match=f"{name}.*7 cannot be halved.*even"):
        small(name).build(odd, odd)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("self_attention_concat", 4.20),
        ("self_attention_separate", 8.40),
        ("bi_deformable_attention", 3.35),
        ("mvfuser", 1.67),
    ],
)
def test_parameters_of_table_3(name: str, millions: float) -> None:
    shape = TokenShape(1024, (36, 36), 1)
    with torch.device("meta"):
        adapter = SPECS[name]().build(shape, shape)
    assert adapter is not None
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 2) == millions
