from __future__ import annotations

import torch

from mfuser import TokenShape
from mfuser_plugins.fusion.cross_attention import CrossAttentionSpec

SHAPE = TokenShape(8, (2, 3), 1)


def test_equals_rein_s_equations() -> None:
    adapter = CrossAttentionSpec(tokens=5, rank=2, dropout=0.0).build(SHAPE, SHAPE).double()
    f = torch.randn(1, 7, 8, dtype=torch.float64)
    T = adapter.A @ adapter.B
    S = (f[0] @ T.T / 8**0.5).softmax(-1)
    found = S[:, 1:] @ (T[1:] @ adapter.map_tokens.weight.T + adapter.map_tokens.bias)
    want = ((f[0] + found) @ adapter.map_features.weight.T + adapter.map_features.bias) * 1e-3
    for got in adapter(f, f):
        assert got is not None
        torch.testing.assert_close(got[0], want, rtol=1e-6, atol=1e-12)


def test_tokens_are_of_low_rank_and_unit_length() -> None:
    adapter = CrossAttentionSpec().build(TokenShape(512, (1, 1), 0), None)
    tokens = adapter.A @ adapter.B
    assert tokens.shape == (100, 512)
    assert torch.linalg.matrix_rank(tokens.detach()) == 16
    assert 0.9 < tokens.detach().norm(dim=1).mean() < 1.1
