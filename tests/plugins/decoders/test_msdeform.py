from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfuser_plugins.decoders._msdeform import DeformableAttention, deformable_attention
from mfuser_plugins.decoders._transformer import pixel_centers, sine_positions


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """(h, w, d) at (x, y) in [0, 1], zero outside, pixel centers at halves."""
    h, w, d = image.shape
    x, y = x * w - 0.5, y * h - 0.5
    out = torch.zeros(d, dtype=image.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < h and 0 <= column < w:
                out += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return out


def by_loops(value: Tensor, shapes: list[tuple[int, int]], at: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, levels, points, _ = at.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    start = 0
    for level in range(levels):
        h, w = shapes[level]
        for b in range(batch):
            for head in range(heads):
                image = value[b, start : start + h * w, head].reshape(h, w, -1)
                for q in range(queries):
                    for p in range(points):
                        x, y = at[b, q, head, level, p].tolist()
                        out[b, q, head] += weights[b, q, head, level, p] * bilinear(image, x, y)
        start += h * w
    return out.flatten(2)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    points=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_equals_bilinear_sampling_by_hand(
    shapes: list[tuple[int, int]], heads: int, points: int, seed: int
) -> None:
    torch.manual_seed(seed)
    value = torch.randn(2, sum(h * w for h, w in shapes), heads, 2, dtype=torch.float64)
    split = (2, 3, heads, len(shapes), points)
    at = torch.rand(*split, 2, dtype=torch.float64) * 1.6 - 0.3  # some outside the maps
    weights = torch.randn(split, dtype=torch.float64)
    out = deformable_attention(value, shapes, at, weights)
    assert torch.allclose(out, by_loops(value, shapes, at, weights), rtol=1e-9, atol=1e-9)


def test_module_looks_where_its_offsets_say() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3), (5, 4)]
    module = DeformableAttention(8, heads=2, levels=2, points=3).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    query, value = torch.randn(2, 4, 8).double(), torch.randn(2, 26, 8).double()
    reference = torch.rand(4, 2).double()
    at = torch.empty(2, 4, 2, 2, 3, 2).double()
    offsets = module.sampling_offsets(query).view_as(at)
    for level, (h, w) in enumerate(shapes):
        # An offset of 1 is one pixel of that level.
        at[:, :, :, level, :, 0] = reference[:, None, None, 0] + offsets[:, :, :, level, :, 0] / w
        at[:, :, :, level, :, 1] = reference[:, None, None, 1] + offsets[:, :, :, level, :, 1] / h
    weights = module.attention_weights(query).view(2, 4, 2, 6).exp()
    weights = (weights / weights.sum(-1, keepdim=True)).view(2, 4, 2, 2, 3)
    values = module.value_proj(value).view(2, 26, 2, 4)
    want = module.output_proj(by_loops(values, shapes, at, weights))
    out = module(query, value, reference, shapes)
    assert torch.allclose(out, want, rtol=1e-9, atol=1e-9)


def test_heads_start_in_different_directions() -> None:
    module = DeformableAttention(16, heads=8, levels=3, points=4)
    offsets = module.sampling_offsets(torch.randn(1, 16)).view(8, 3, 4, 2)
    assert torch.equal(offsets[0, 1], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    assert torch.allclose(offsets[1, 0, 0], torch.tensor([1.0, 1.0]))
    assert len({tuple(o) for o in offsets[:, 0, 0].round(decimals=3).tolist()}) == 8


def test_half_precision_keeps_places() -> None:
    torch.manual_seed(0)
    module = DeformableAttention(16, 4, 1, 2)
    query, value = torch.randn(1, 64 * 64, 16), torch.randn(1, 64 * 64, 16)
    want = module(query, value, pixel_centers((64, 64), query), [(64, 64)])
    half = module.bfloat16()
    query, value = query.bfloat16(), value.bfloat16()
    out = half(query, value, pixel_centers((64, 64), query), [(64, 64)])
    assert out.dtype == torch.bfloat16
    # bfloat16 has 8 bits: 0.4 % a rounding. Places in bfloat16 would be off by 0.25 pixels.
    assert (out - want).square().mean() < 0.02**2 * want.square().mean()


def test_pixel_centers_go_row_by_row() -> None:
    centers = pixel_centers((2, 4), torch.empty(0))
    assert centers.shape == (8, 2)
    assert centers[1].tolist() == [3 / 8, 1 / 4] and centers[4].tolist() == [1 / 8, 3 / 4]


def test_sine_positions_by_hand() -> None:
    positions = sine_positions((3, 5), 8, torch.empty(0, dtype=torch.float64))
    assert positions.shape == (15, 8)
    y, x = 2 / 3 * 2 * math.pi, 4 / 5 * 2 * math.pi  # row 1, column 3, counted from one step
    want = []
    for angle in (y, y / 100, x, x / 100):
        want += [math.sin(angle), math.cos(angle)]
    # 1e-6 is added to each length.
    assert torch.allclose(positions[8], torch.tensor(want, dtype=torch.float64), atol=1e-5)
