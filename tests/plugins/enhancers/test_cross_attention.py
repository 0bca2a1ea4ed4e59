from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from mfuser_plugins.enhancers.cross_attention import (
    CrossAttentionEnhancerSpec,
    CrossAttentionLayer,
)


def test_layer_equals_a_pre_norm_transformer_decoder() -> None:
    ours = CrossAttentionLayer(CrossAttentionEnhancerSpec(width=16, heads=2, dropout=0.0)).double()
    theirs = torch.nn.TransformerDecoderLayer(
        16, 2, 64, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    ).double()
    with torch.no_grad():
        for mine, other in (
            (ours.self_attn, theirs.self_attn),
            (ours.cross_attn, theirs.multihead_attn),
        ):
            weights = [mine.q_proj.weight, mine.k_proj.weight, mine.v_proj.weight]
            other.in_proj_weight.copy_(torch.cat(weights))
            other.in_proj_bias.zero_()
            other.out_proj.load_state_dict(mine.proj.state_dict())
        theirs.linear1.load_state_dict(ours.mlp[0].state_dict())
        theirs.linear2.load_state_dict(ours.mlp[3].state_dict())
    text, visual = torch.randn(2, 5, 16).double(), torch.randn(2, 9, 16).double()
    torch.testing.assert_close(ours(text, visual), theirs(text, visual), rtol=1e-9, atol=1e-12)


def test_every_class_reads_the_image_and_the_other_classes() -> None:
    module = CrossAttentionEnhancerSpec(width=8, heads=1, dropout=0.0).build(8, 5).double()
    text = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    visual = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    by_text, by_visual = torch.autograd.grad(
        module(text, visual)[0, 0].square().sum(), (text, visual)
    )
    assert (by_text[0].abs().sum(-1) > 0).all() and (by_visual[0].abs().sum(-1) > 0).all()


def test_gamma_of_zero_hands_the_text_on() -> None:
    module = CrossAttentionEnhancerSpec(width=8, gamma_init=0).build(6, 3)
    text = torch.randn(1, 3, 6)
    assert torch.equal(module(text, torch.randn(1, 5, 6)), text)


def test_heads_that_do_not_fit() -> None:
    with pytest.raises(ValidationError, match="width 30 must be a multiple of heads 4"):
        CrossAttentionEnhancerSpec(width=30)
