"""How the encoders fit: resampling, projections, memory, and warnings."""

from __future__ import annotations

import contextlib
import time
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from mfuser.config.pairing import PairingSpec, option_of
from mfuser.errors import MFuserError
from mfuser.interfaces import VisionBackbone
from mfuser.model.dgss import DGSSModel
from mfuser.model.pyramid import STRIDES

FAR = 2.0
"""Grids whose sides differ by more than this are a poor fit: three of four patches are invented."""


def resampling(model: DGSSModel) -> list[str]:
    """Resampled features, from which grid to which."""
    encoder = model.encoder
    lines = [
        f"taps of the {role}: {_grid(b.grid)} to {_grid(encoder.grid)}"
        for role, b in encoder.backbones.items()
        if b.grid != encoder.grid
    ]
    if (vlm := encoder.vlm) is not None:
        lines += [
            f"final {role} patches: {_grid(vfm.grid)} to {_grid(vlm.grid)}, where they are added "
            "to the vlm's"
            for role, vfm in encoder.vfms.items()
            if vfm.grid != vlm.grid
        ]
    return lines


def projections(model: DGSSModel) -> list[str]:
    """Linear maps between widths."""
    encoder = model.encoder
    lines = []
    for role in encoder.vfms:
        p = encoder.projection(role)
        if isinstance(p, nn.Linear):
            lines.append(f"final {role} tokens: {p.in_features} to {p.out_features}")
    width = model.spec.pyramid.width
    if width is not None and model.pyramid is not None:
        lines.append(f"taps: {encoder.tap_channels} to {width}, at each of {len(STRIDES)} strides")
    if encoder.vlm is not None and encoder.vlm.text_dim != encoder.vlm.embed_dim:
        lines.append(
            f"vlm tokens to the joint space: {encoder.vlm.embed_dim} to {encoder.vlm.text_dim}"
        )
    return lines


def warnings(spec: PairingSpec, model: DGSSModel) -> list[str]:
    """Signs of a poor fit, each with the remedy."""
    encoder = model.encoder
    found = []
    vlm = encoder.vlm
    for (one, a), (other, b) in combinations(encoder.backbones.items(), 2):
        ratio = max(max(x / y, y / x) for x, y in zip(a.grid, b.grid, strict=True))
        if ratio > FAR:
            coarse, fine = (one, other) if a.grid[0] < b.grid[0] else (other, one)
            found.append(
                f"the grids {_grid(a.grid)} ({one}) and {_grid(b.grid)} ({other}) differ by a "
                f"factor of {ratio:.1f}: each patch of the {coarse} is spread over several of the "
                f"{fine}; give one of them a patch_size nearer to the other's"
            )
    for role, backbone in encoder.backbones.items():
        found += _of_encoder(role, spec, backbone)
    if vlm is not None and model.prompt is not None and isinstance(model.ids, Tensor):
        try:
            with torch.no_grad():
                vlm.encode_text(model.ids, model.prompt.contexts)
        except MFuserError as error:
            found.append(
                "the vlm's text tower takes no prompt of "
                f"{spec.prompt.context} learned tokens ({error}); set prompt.context = 0"
            )
        except (NotImplementedError, RuntimeError):
            pass  # not to be laid out without values
    return found


def _of_encoder(role: str, spec: PairingSpec, backbone: VisionBackbone) -> list[str]:
    found = []
    size, patch = spec.image_size, backbone.patch_size
    lost = [s - g * p for s, g, p in zip(size, backbone.grid, patch, strict=True)]
    if any(left > 0 for left in lost):
        found.append(
            f"image_size {_grid(size)} is not a multiple of the {role}'s patch {_grid(patch)}: its "
            f"last {lost[0]} rows and {lost[1]} columns are cut off, and the map is stretched"
        )
    own = spec.encoders()[role]
    if own.freeze and "random" in (getattr(own, "weights", None), getattr(own, "model", None)):
        found.append(
            f"the {role} starts from random numbers and is frozen; set {option_of(role)}.freeze = "
            "false, or name weights"
        )
    return found


def memory(model: DGSSModel, images: Tensor) -> dict[str, float] | None:
    """GiB of a training step in float32: weights, gradients and AdamW's state, activations of one
    image. None where the model cannot be laid out without values.

    Activations are what autograd saves in the forward pass; kernels' workspace comes on top.
    """
    gib = 2.0**30
    tensors = [*model.parameters(), *model.buffers()]
    # Private: on the meta device every storage's public data_ptr() is 0.
    own = {t.untyped_storage()._cdata for t in tensors}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Held, so that no later storage gets the same address.
            saved.setdefault(storage._cdata, (storage, storage.nbytes()))
        return tensor

    labels = torch.zeros(len(images), *images.shape[-2:], dtype=torch.long, device=images.device)
    was_training = model.training
    try:
        model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.enable_grad():
            output = model(images)
            # Losses that depend on values are small beside the rest.
            with contextlib.suppress(NotImplementedError, RuntimeError):
                model.losses(output, labels, images)
    except (NotImplementedError, RuntimeError, MFuserError):
        return None
    finally:
        model.train(was_training)
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {
        "weights": weights / gib,
        "gradients and optimizer": 3 * trained / gib,
        "activations of one image": sum(size for _, size in saved.values()) / gib,
    }


def speed(device: str | None = None, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a matrix product here: an upper bound for any model.

    device: None: a GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    side = 4096 if device == "cuda" else 512
    a = torch.rand(side, side, device=device, dtype=dtype)
    a @ a
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        b = a @ a
        float(b[0, 0])  # waits for it
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e9


def _grid(grid: Any) -> str:
    return f"{grid[0]}x{grid[1]}"
