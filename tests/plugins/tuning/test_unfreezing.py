"""full, layer_norm_only and bias: what of the encoders' own parameters trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mfuser import MFuserError, VisionBackbone, build_model, components
from mfuser.engine import checkpoints
from mfuser_plugins.tuning._blocks import BlocksSpec
from mfuser_plugins.tuning.bias import BiasSpec
from mfuser_plugins.tuning.full import FullSpec
from mfuser_plugins.tuning.layer_norm_only import LayerNormOnlySpec

WIDTH, DEPTH = 32, 3


def backbone(model: str = "vit_tiny_patch16_224") -> VisionBackbone:
    options = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
    spec = components("vision")["timm"](model=model, weights="random", options=options)
    return spec.build((64, 64))  # type: ignore[attr-defined, no-any-return]


def trained(module: nn.Module) -> dict[str, int]:
    return {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}


BLOCK = 12 * WIDTH**2 + 13 * WIDTH
"""Attention 4 D D + 4 D, MLP 8 D D + 5 D, two norms 4 D."""


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (FullSpec(), DEPTH * BLOCK),
        (FullSpec(blocks=(1, 3)), 2 * BLOCK),
        (LayerNormOnlySpec(), DEPTH * 4 * WIDTH),
        (LayerNormOnlySpec(blocks=(2, 3)), 4 * WIDTH),
        (BiasSpec(), DEPTH * 11 * WIDTH),
        (BiasSpec(blocks=(0, 1)), 11 * WIDTH),
    ],
)
def test_counts(spec: BlocksSpec, count: int) -> None:
    tower = backbone()
    spec.build(tower)
    names = trained(tower)
    assert sum(names.values()) == count
    first, last = spec.blocks or (0, DEPTH)
    assert {int(name.split("blocks.")[1].split(".")[0]) for name in names} == {*range(first, last)}


def test_norms_and_biases_of_other_libraries() -> None:
    tower = backbone("eva_giant_patch14_224")
    BiasSpec().build(tower)
    assert {"q_bias", "v_bias"} <= {name.rsplit(".", 1)[1] for name in trained(tower)}
    # DINOv3's norms are layer norms; RMS norms are not subclasses of torch's layer norm.
    spec = components("vision")["timm"](
        model="vit_little_patch16_reg4_gap_256.sbb_in1k", weights="random",
        options={"embed_dim": 32, "depth": 2, "num_heads": 2},
    )  # fmt: skip
    tower = spec.build((64, 64))  # type: ignore[attr-defined]
    LayerNormOnlySpec().build(tower)
    assert all("norm" in name for name in trained(tower))


class NoNorms(VisionBackbone):
    embed_dim, depth, num_prefix_tokens = 8, 1, 0
    resize = embed = block = finish = lambda *_: None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False)])


def test_what_is_not_there_is_refused() -> None:
    for spec, what in ((LayerNormOnlySpec(), "norms"), (BiasSpec(), "biases")):
        with pytest.raises(MFuserError, match=f"blocks have no {what} to train"):
            spec.build(NoNorms())
    with pytest.raises(MFuserError, match=r"blocks \[2, 4\] go beyond the 3"):
        FullSpec(blocks=(2, 4)).build(backbone())


@pytest.mark.parametrize("name", ["full", "layer_norm_only", "bias"])
def test_it_trains_and_is_saved_and_the_rest_is_not(tiny: Any, tmp_path: Any, name: str) -> None:
    table = {"name": name, "encoders": ["vfm"], "blocks": [1, 2]}
    model = build_model("plain", tiny, tuning=table)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images = torch.rand(2, 3, 64, 96)
    losses = model(images, torch.randint(0, 19, (2, 64, 96)))
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    towers = ("encoder.vfm.", "encoder.vlm.")
    changed = {n for n, p in model.named_parameters() if (p != before[n]).any()}
    own = {n for n in trained(model) if n.startswith(towers)}
    assert own and own & changed and {n for n in changed if n.startswith(towers)} <= own
    assert all(n.startswith("encoder.vfm.") for n in own)
    saved = checkpoints.trained_state(model)
    assert own <= set(saved)
    path = tmp_path / "model.safetensors"
    meta = {"step": 1, "run": {}, "pairing": {}, "frozen": checkpoints.frozen_fingerprint(model)}
    checkpoints.write(path, checkpoints.Checkpoint(saved, {}, meta))
    fresh = build_model("plain", tiny, tuning=table)
    checkpoints.restore(fresh, checkpoints.read(path), path)
    assert torch.equal(fresh.segment(images), model.segment(images))
