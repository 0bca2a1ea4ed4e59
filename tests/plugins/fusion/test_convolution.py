from __future__ import annotations

import torch
import torch.nn.functional as F

from mfuser import TokenShape
from mfuser_plugins.fusion.convolution import ConvolutionSpec

SHAPE = TokenShape(6, (4, 5), 1)


def test_equals_the_spatial_branch_on_the_grid() -> None:
    adapter = ConvolutionSpec(dropout=0.0).build(SHAPE, None).double()
    x = torch.randn(1, 21, 6, dtype=torch.float64)
    halved = (x[0, 1:] @ adapter.in_proj.weight.T).view(4, 5, 3)
    padded = F.pad(halved, (0, 0, 1, 1, 1, 1))
    want = torch.zeros(4, 5, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            want += padded[i : i + 4, j : j + 5] * adapter.conv.weight[:, 0, i, j]
    want = (want * want.sigmoid()).view(20, 3) @ adapter.out_proj.weight.T * 1e-3
    got, none = adapter(x, None)
    assert none is None and got is not None
    assert (got[0, 0] == 0).all()  # the class token has no place on the grid
    torch.testing.assert_close(got[0, 1:], want, rtol=1e-6, atol=1e-12)


def test_both_encoders_pass_through_the_same_weights() -> None:
    adapter = ConvolutionSpec(dropout=0.0).build(SHAPE, SHAPE)
    x = torch.randn(2, 21, 6)
    vfm, vlm = adapter(x, x)
    assert torch.equal(vfm, vlm)
