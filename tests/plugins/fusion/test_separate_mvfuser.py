from __future__ import annotations

import torch

from mfuser import TokenShape
from mfuser_plugins.fusion.separate_mvfuser import SeparateMVFuserSpec

VFM, VLM = TokenShape(8, (2, 2), 1), TokenShape(12, (3, 3), 0)


def test_each_encoder_has_a_scan_at_its_own_width() -> None:
    adapter = SeparateMVFuserSpec(state_size=3, bidirectional="sum").build(VFM, VLM).eval()
    vfm, vlm = torch.randn(2, 5, 8), torch.randn(2, 9, 12)
    assert adapter.vfm is not None and adapter.vlm is not None
    got = adapter(vfm, vlm, VFM.grid, VLM.grid)
    assert torch.equal(got[0], adapter.vfm(vfm)) and torch.equal(got[1], adapter.vlm(vlm))
    assert adapter.vfm.reverse is not None
