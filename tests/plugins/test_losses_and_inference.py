"""Every loss and every inference, over decoders, fusions and tunings: a step, then an image.

A loss and an inference never meet, so that they share runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfuser import InferenceSpec, Registry, build_model, components

LOSSES: dict[str, dict[str, Any]] = {
    "none": {},
    "ohem": {},
    "class_balanced": {},
    "consistency": {"distance": "mse"},
    "language_regularization": {"slots": 16},
    "vision_regularization": {"dense": True},
}
INFERENCES: dict[str, dict[str, Any]] = {
    "sliding": {"window_batch": 2},
    "whole": {},
    "multi_scale_flip": {"scales": [1.0, 1.5]},
    "coarse_to_fine": {"scale": 0.7, "threshold": 0.3},
}
PARTS: dict[str, list[str]] = {
    "decoder": ["text_mask2former", "linear"],  # shares, logits
    "fusion": ["mvfuser", "none", "cross_attention"],
    "tuning": ["none", "lora"],
}


def test_all_are_there() -> None:
    for kind, tried in (("loss", {*LOSSES} - {"none"}), ("inference", {*INFERENCES})):
        own = {
            name
            for name, spec in components(kind).items()
            if spec.__module__.startswith("mfuser_plugins.")
        }
        assert own == tried, kind


@pytest.mark.parametrize("loss", LOSSES)
def test_trains_a_step_and_segments(loss: str, tiny: Registry) -> None:
    i = list(LOSSES).index(loss)
    inference = list(INFERENCES)[i % len(INFERENCES)]
    parts: dict[str, Any] = {
        kind: {"name": (name := names[i % len(names)]), **tiny_options(kind, name)}
        for kind, names in PARTS.items()
    }
    if loss != "none":
        parts["losses"] = [{"name": loss, **LOSSES[loss]}]
    model = build_model("plain", tiny, **parts)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = model.train()(torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96)))
    assert (loss == "none") != any(name.startswith(f"{loss}.") for name in losses)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    spec = components("inference")[inference].model_validate(
        {"name": inference, **INFERENCES[inference]}
    )
    assert isinstance(spec, InferenceSpec)
    scores = model.segment_by(spec.build(), torch.rand(1, 3, 70, 100))
    assert scores.shape == (1, 19, 70, 100) and scores.isfinite().all()


def tiny_options(kind: str, name: str) -> dict[str, Any]:
    return {} if name == "none" else dict(components(kind)[name].tiny)
