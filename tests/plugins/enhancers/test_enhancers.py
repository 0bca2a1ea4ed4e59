"""The contract of every text enhancer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfuser import EnhancerSpec
from mfuser_plugins.enhancers.cross_attention import CrossAttentionEnhancerSpec
from mfuser_plugins.enhancers.mamba_only import MambaOnlySpec
from mfuser_plugins.enhancers.mtenhancer import MTEnhancerSpec

SPECS = [
    CrossAttentionEnhancerSpec(width=8, heads=2, layers=2),
    MambaOnlySpec(width=8, state_size=2, layers=2),
    MTEnhancerSpec(width=8, heads=2, state_size=2),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 3), classes=st.integers(1, 6), visual=st.integers(1, 9))
def test_any_number_of_classes_and_tokens(
    spec: EnhancerSpec, batch: int, classes: int, visual: int
) -> None:
    module = spec.build(6, classes)
    text = torch.randn(batch, classes, 6)
    out = module(text, torch.randn(batch, visual, 6))
    assert out.shape == text.shape and out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
