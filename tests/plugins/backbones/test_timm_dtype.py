"""Frozen towers in half precision, and what stands between their blocks in single."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mfuser import MFuserError, VisionBackbone, components

FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    # Rotary positions, in single precision.
    "vit_small_patch16_dinov3": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}


def tower(model: str, **options: Any) -> VisionBackbone:
    table = {"weights": "random", "options": FAMILIES[model], **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return components("vision")["timm"](model=model, **table).build((64, 64))  # type: ignore[attr-defined, no-any-return]


def run(tower: VisionBackbone, images: torch.Tensor) -> list[torch.Tensor]:
    stream = tower.embed(tower.normalize(images))
    found = [stream.tokens]
    for i in range(tower.depth):
        found.append(tower.step(i, found[-1], stream.state))
    return [*found, tower.finish(found[-1], stream.state)]


@pytest.mark.parametrize("model", FAMILIES)
def test_single_precision_between_the_blocks(model: str) -> None:
    images = torch.rand(1, 3, 64, 64)
    half, single = tower(model, dtype="bfloat16"), tower(model)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} <= {torch.float32}
    with torch.no_grad():
        for got, expected in zip(run(half, images), run(single, images), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    stream, extra = half.embed(half.normalize(images)), torch.randn(1, 3, 32)
    own, joined = half.block_with(0, stream.tokens, stream.state, extra, None)
    assert own.dtype == joined.dtype == torch.float32
    # Brought to single precision as a whole, as an export does.
    assert run(half.float(), images)[-1].dtype == torch.float32
    half.resize((96, 64))
    assert half.grid == (6, 4)


def test_weights_in_half_precision_do_not_train_themselves() -> None:
    with pytest.raises(ValidationError, match='dtype = "bfloat16" is for frozen weights'):
        tower("vit_tiny_patch16_224", dtype="bfloat16", freeze=False)
    with pytest.raises(MFuserError, match="weights in bfloat16 cannot be trained themselves"):
        spec = components("tuning")["full"]()
        spec.build(tower("vit_tiny_patch16_224", dtype="bfloat16"))  # type: ignore[attr-defined]
