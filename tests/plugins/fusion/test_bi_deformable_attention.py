from __future__ import annotations

import torch

from mfuser import TokenShape
from mfuser_plugins.fusion.bi_deformable_attention import BiDeformableAttentionSpec

VFM, VLM = TokenShape(8, (5, 5), 2), TokenShape(8, (4, 6), 1)


def test_prefix_tokens_neither_ask_nor_answer() -> None:
    adapter = BiDeformableAttentionSpec(heads=2, dropout=0.0).build(VFM, VLM)
    vfm, vlm = torch.randn(1, 27, 8), torch.randn(1, 25, 8)
    before = adapter(vfm, vlm)
    assert (before[0][:, :2] == 0).all() and (before[1][:, :1] == 0).all()
    assert (before[0][:, 2:] != 0).any(-1).all() and (before[1][:, 1:] != 0).any(-1).all()
    vfm[:, :2] = 100.0
    after = adapter(vfm, vlm)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def seen(gradient: torch.Tensor) -> torch.Tensor:
    """Which tokens count: bilinear weights are rounded, so that a neighbor may have 1e-7."""
    size = gradient.abs().sum(-1)
    return size > 1e-4 * size.max()


def test_looks_around_its_own_place_in_both_grids() -> None:
    adapter = BiDeformableAttentionSpec(heads=2, points=1, dropout=0.0).build(VFM, VLM)
    vfm, vlm = torch.randn(1, 27, 8, requires_grad=True), torch.randn(1, 25, 8, requires_grad=True)
    # One point a head, which starts one pixel to the left or right: (2, 2) reads (2, 1), (2, 3).
    adapter(vfm, vlm)[0][0, 2 + 2 * 5 + 2].square().sum().backward()
    assert vfm.grad is not None and vlm.grad is not None
    read = seen(vfm.grad[0, 2:]).unflatten(0, (5, 5))
    assert read[2].tolist() == [False, True, False, True, False]
    assert not read[[0, 1, 3, 4]].any()
    # Its center (0.5, 0.5) lies between four patches of the 4 x 6 grid.
    other = seen(vlm.grad[0, 1:]).unflatten(0, (4, 6))
    assert other[1:3, 1:5].any() and not other[[0, 3]].any() and not other[:, [0, 5]].any()
