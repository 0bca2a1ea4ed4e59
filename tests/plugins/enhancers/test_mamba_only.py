from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mfuser_plugins.enhancers.mamba_only import MambaOnlySpec
from mfuser_plugins.enhancers.mtenhancer import MTEnhancerSpec


def test_is_mtenhancer_without_attention() -> None:
    ours = MambaOnlySpec(width=16, state_size=3, dropout=0.0).build(12, 5).eval()
    whole = MTEnhancerSpec(width=16, heads=2, state_size=3, dropout=0.0).build(12, 5).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    renamed = {"norm1": "norm2", "norm2": "norm3", "scan": "cross_attn"}
    state = whole.state_dict()
    for name, value in ours.state_dict().items():
        part = name.split(".")[2] if name.startswith("decoder.") else ""
        state[name.replace(f".{part}.", f".{renamed.get(part, part)}.")] = value
    for name in ("weight", "bias"):  # the attention adds nothing
        state[f"decoder.0.self_attn.proj.{name}"].zero_()
    whole.load_state_dict(state)
    text, visual = torch.randn(2, 5, 12), torch.randn(2, 10, 12)
    torch.testing.assert_close(ours(text, visual), whole(text, visual))
    assert not any("self_attn" in name for name in ours.state_dict())


def test_odd_width() -> None:
    with pytest.raises(ValidationError, match="width 15 must be even, e.g. 16"):
        MambaOnlySpec(width=15)
