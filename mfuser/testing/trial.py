"""A component among others: one training step of a tiny pairing, and a sliding window."""

from __future__ import annotations

import torch
from torch import nn

from mfuser.config.pairing import PairingSpec
from mfuser.errors import MFuserError, PluginError
from mfuser.inference import Inference
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel
from mfuser.model.joining import CannotJoinError
from mfuser.plugins.contracts import built, origin
from mfuser.specs import InferenceSpec
from mfuser.testing.compare import require_finite, require_gradients
from mfuser.testing.partners import CLASSES, IMAGE, ROLES, labels_for
from mfuser.testing.verdict import Broken, NotTried

PLACE = {
    "vfm": "encoder.vfm",
    "vlm": "encoder.vlm",
    "fusion": "encoder.adapters",
    "tuning": "encoder",
    "enhancer": "enhancer",
    "decoder": "decoder",
    "losses": "criteria",
}


def trial(spec: PairingSpec, kind: str) -> str:
    """Assembly, a training step and a sliding window"""
    try:
        return _trial(spec, kind)
    except CannotJoinError as error:
        raise NotTried(str(error)) from error
    except PluginError as error:
        own = spec.losses[0] if kind == "loss" else getattr(spec, ROLES[kind])
        if origin(own) in str(error):
            raise
        raise NotTried(f"a partner does not work here: {error}") from error


def _trial(spec: PairingSpec, kind: str) -> str:
    model = build_model(spec).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    fixed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    encoders = tuple(f"encoder.{role}." for role in model.encoder.backbones)
    fixed |= {n: b.clone() for n, b in model.named_buffers() if n.startswith(encoders)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.rand(2, 3, *IMAGE)
        losses = model(images, labels_for(2, IMAGE, len(CLASSES)))
        total = torch.stack(list(losses.values())).sum()
    if not total.isfinite():
        raise Broken(
            "the losses of a training step",
            ", ".join(f"{k} {float(v.detach()):.3g}" for k, v in losses.items()),
            "finite numbers",
            "look for divisions by zero and logarithms",
        )
    total.backward()
    _gradients(model, PLACE[ROLES[kind]])
    optimizer.step()
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, before in fixed.items():
        if not torch.equal(now[name], before):
            raise Broken(
                "a training step",
                f"the frozen '{name}' has changed",
                "frozen tensors as they were",
                "look for running statistics and in-place updates in forward()",
            )
    scores = model.segment(torch.rand(3, IMAGE[0] + 13, IMAGE[1] + 22))
    if not scores.isfinite().all():
        raise Broken(
            f"a sliding window over an image of {IMAGE[0] + 13}x{IMAGE[1] + 22} after the step",
            "scores that are not finite",
            "finite numbers",
            "",
        )
    frozen = sum(n in dict(model.named_parameters()) for n in fixed)
    loss = float(total.detach())
    return f"a training step (loss {loss:.2f}; {frozen} frozen tensors unchanged) and a window"


def asked(inference: InferenceSpec, spec: PairingSpec) -> str:
    """Images of the window's size and of another, through an assembled pairing"""
    model = build_model(spec)
    build = inference.build
    try:
        for size in (IMAGE, (IMAGE[0] + 13, IMAGE[1] + 22)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                images = torch.rand(2, 3, *size)
            scores = model.segment_by(built(inference, Inference, build), images)
            require_finite(
                {"scores": scores},
                f"images of {size[0]}x{size[1]}",
                "look for divisions by a count of zero",
            )
    except MFuserError as error:
        if origin(inference) in str(error):
            raise
        raise NotTried(f"refused: {error}") from error
    return "the window's size and a larger one, finite scores"


def _gradients(model: DGSSModel, place: str) -> None:
    module: nn.Module | None = model
    for name in place.split("."):
        module = getattr(module, name)
    if module is None:
        return
    require_gradients(module, "backward() from the losses of a training step")
