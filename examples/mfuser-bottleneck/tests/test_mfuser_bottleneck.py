"""Tests of mfuser-bottleneck."""

import torch
from mfuser import TokenShape
from mfuser.testing import conforms

from mfuser_bottleneck import Bottleneck, BottleneckSpec


def test_conforms():
    conforms(BottleneckSpec)


def test_encoders_start_as_they_are():
    adapter = BottleneckSpec(name="bottleneck").build(
        TokenShape(48, (3, 5), 1), TokenShape(32, (2, 4), 0)
    )
    offsets = adapter(torch.randn(2, 16, 48), torch.randn(2, 8, 32))
    assert not any(offset.any() for offset in offsets)


def test_one_sequence_learns_of_the_other():
    torch.manual_seed(0)
    bottleneck = Bottleneck([6, 8], tokens=3, width=16)
    for up in bottleneck.up:
        torch.nn.init.normal_(up.weight)
    one, other = torch.randn(1, 5, 6), torch.randn(1, 7, 8, requires_grad=True)
    bottleneck([one, other])[0].sum().backward()
    assert other.grad.abs().min() > 0


def test_equals_the_definition():
    """By hand, in float64: softmax(q k' / sqrt(d)) v, read by the tokens, averaged, read back."""
    torch.manual_seed(0)
    bottleneck = Bottleneck([6, 8], tokens=3, width=4).double()
    for up in bottleneck.up:
        torch.nn.init.normal_(up.weight)
    sequences = [torch.randn(2, 5, 6).double(), torch.randn(2, 7, 8).double()]

    def attend(q, kv):
        return (q @ kv.transpose(1, 2) / 4**0.5).softmax(-1) @ kv

    low = [down(x) for down, x in zip(bottleneck.down, sequences)]
    tokens = bottleneck.tokens.repeat(2, 1, 1)
    shared = (attend(tokens, low[0]) + attend(tokens, low[1])) / 2
    for i, offset in enumerate(bottleneck(sequences)):
        expected = bottleneck.up[i](attend(low[i], shared))
        torch.testing.assert_close(offset, expected, rtol=1e-12, atol=1e-12)
