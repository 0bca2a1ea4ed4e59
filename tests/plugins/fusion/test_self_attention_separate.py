from __future__ import annotations

import pytest
import torch

from mfuser import MFuserError, TokenShape, build_model
from mfuser_plugins.fusion.self_attention_separate import SelfAttentionSeparateSpec

SHAPE = TokenShape(8, (1, 2), 0)


def test_each_encoder_asks_the_other() -> None:
    adapter = SelfAttentionSeparateSpec(heads=1, dropout=0.0).build(SHAPE, SHAPE).double()
    vfm, vlm = torch.randn(2, 1, 2, 8, dtype=torch.float64)

    def reads(module: torch.nn.Module, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        k, v = module.key_value(memory).chunk(2, -1)
        weights = (module.query(x) @ k.transpose(1, 2) / 8**0.5).softmax(-1)
        return module.out(weights @ v) * 1e-3

    got = adapter(vfm, vlm)
    torch.testing.assert_close(got[0], reads(adapter.vfm_reads, vfm, vlm), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(got[1], reads(adapter.vlm_reads, vlm, vfm), rtol=1e-6, atol=1e-12)


def test_refused_with_one_encoder(tiny) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MFuserError, match="self_attention_separate.*joins two"):
        build_model("lone", tiny, fusion="self_attention_separate")
