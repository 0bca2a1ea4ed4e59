from __future__ import annotations

import torch

from mfuser import TokenShape
from mfuser_plugins.fusion.self_attention_concat import SelfAttentionConcatSpec

SHAPE = TokenShape(16, (2, 3), 1)


def test_equals_pytorch_s_attention_on_the_joint_sequence() -> None:
    adapter = SelfAttentionConcatSpec(heads=4, dropout=0.0).build(SHAPE, SHAPE).double()
    ours = adapter.attention
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    vfm, vlm = torch.randn(2, 2, 7, 16, dtype=torch.float64)
    joint = torch.cat([vfm, vlm], 1)
    want = theirs(joint, joint, joint)[0] * 1e-3
    got = torch.cat(adapter(vfm, vlm), 1)
    # The gain is a float32 0.001.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)


def test_heads_follow_the_width() -> None:
    for width, heads in [(1024, 16), (384, 6), (192, 3), (48, 1), (200, 2)]:
        shape = TokenShape(width, (2, 2), 0)
        assert SelfAttentionConcatSpec().build(shape, shape).attention.heads == heads
