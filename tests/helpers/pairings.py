"""What every pairing that ships computes, reduced to three blocks: to see that nothing changed.

    python tests/helpers/pairings.py > now.json
    PYTHONPATH=OLD:OLD/plugins:OLD/kernels python tests/helpers/pairings.py > before.json

OLD: another commit's files (git archive). The weights follow from their names, so that two commits
are compared which initialize in another order. tests/golden/pairings.json is of commit 50a32b5,
and, for pairings and components that came later, of 705bafa.
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import torch

from mfuser import DGSSModel, PairingSpec, Registry, build_model, load_registry

TOWER = {"weights": "random", "options": {"embed_dim": 64, "depth": 3, "num_heads": 2}}
CLIP = {
    "name": "open_clip",
    "model": "ViT-B-16",
    "weights": "random",
    "options": {
        "embed_dim": 24,
        "vision_cfg": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"layers": 1, "width": 32, "heads": 2},
    },
}
DECODER = {
    "width": 32,
    "pixel_layers": 1,
    "pixel_ffn": 32,
    "layers": 1,
    "ffn": 32,
    "num_points": 64,
}
SIZES = {"tokens": 20, "rank": 6, "second_rank": 2, "blocks": [1, 3]}


def reduced(registry: Registry, name: str) -> PairingSpec:
    """The pairing with its options, but those that make it large."""
    spec = registry.pairing(name)
    changes: dict[str, Any] = {"image_size": [64, 64], "taps": None, "pyramid": {"width": 32}}
    if isinstance(spec.vfm, tuple):
        changes["vfm"] = [one.model_dump(mode="json") | TOWER for one in spec.vfm]
    elif spec.vfm is not None:
        changes["vfm"] = TOWER if spec.vfm.name == "timm" else CLIP
    if spec.vlm is not None:
        changes |= {"vlm": CLIP, "prompt": {"context": 2}}
    decoder = {**DECODER, "queries": 20, "blocks": 2, "annealing": None}
    changes["decoder"] = {k: v for k, v in decoder.items() if hasattr(spec.decoder, k)}
    if hasattr(spec.fusion, "state_size"):
        changes["fusion"] = {"state_size": 2}
    if hasattr(spec.enhancer, "width"):
        changes["enhancer"] = {"width": 16}
    if spec.tuning is not None:
        given = {k: v for k, v in SIZES.items() if getattr(spec.tuning, k, None)}
        changes["tuning"] = given
    return registry.pairing(name, changes)


def computed(model: DGSSModel) -> dict[str, Any]:
    """Losses of a crop and the sizes of their gradients, by part of the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=seed)
            parameter.copy_(1 + 0.1 * drawn if parameter.ndim < 2 else 0.1 * drawn)
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 64, 64, generator=draws)
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, 32:] = 5
    torch.manual_seed(0)
    losses = model.train()(images, labels)
    torch.stack(list(losses.values())).sum().backward()
    found = {key: float(value.detach()) for key, value in losses.items()}
    sums: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = ".".join(name.split(".")[:2])
            sums[part] = sums.get(part, 0.0) + float(parameter.grad.double().abs().sum())
    return {"losses": found, "gradients": sums}


def main(files: list[str]) -> None:
    torch.set_num_threads(1)
    registry = load_registry(*files)
    result: dict[str, Any] = {}
    for name in sorted(registry.names("pairing")):
        try:
            result[name] = computed(build_model(reduced(registry, name)))
        except Exception as error:  # another commit may refuse what this one takes
            result[name] = {"error": f"{type(error).__name__}: {error}"}
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
