"""The size of a pairing: parameters, FLOPs, memory; laid out without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mfuser.config.pairing import PairingSpec
from mfuser.model.assembly import sketch
from mfuser.model.precision import frozen_bytes
from mfuser.reporting import compatibility
from mfuser.reporting.flops import count_flops
from mfuser.reporting.tables import Table

PARTS = {
    "fusion": "encoder.adapters",
    "merge": "encoder.project_vfm",
    "prompt": "prompt",
    "pyramid": "pyramid",
    "enhancer": "enhancer",
    "decoder": "decoder",
    "losses": "criteria",
    "vlm before training": "before",
}


def describe(spec: PairingSpec) -> dict[str, Any]:
    """Parts with trained and frozen parameters and GFLOPs of one image; encoders' shapes; how they
    fit: schedule, resampling, projections, memory, time, warnings."""
    model = sketch(spec)
    images = torch.empty(1, 3, *spec.image_size, device="meta")
    flops = count_flops(lambda: model(images))
    parts = []
    encoders = spec.encoders()
    for part, path in {**{role: f"encoder.{role}" for role in encoders}, **PARTS}.items():
        module = _submodule(model, path)
        if module is None:
            continue
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
        if trained + frozen == 0 and part not in ("enhancer",):
            continue
        parts.append(
            {
                "part": part,
                "component": _component(encoders.get(part) or getattr(spec, part, None)),
                "trained": trained,
                "frozen": frozen,
                "gflops": flops.below(f"DGSSModel.{path}") / 1e9 if flops else None,
            }
        )
    encoder = model.encoder
    gflops = flops.total / 1e9 if flops else None
    speed = compatibility.speed()
    return {
        "image_size": list(spec.image_size),
        "classes": len(spec.classes),
        "parts": parts,
        "trained": sum(p["trained"] for p in parts),
        "frozen": sum(p["frozen"] for p in parts),
        "gflops": gflops,
        "encoders": {
            role: {
                "model": getattr(encoders[role], "model", encoders[role].name),
                "depth": b.depth,
                "width": b.embed_dim,
                "patch": list(b.patch_size),
                "grid": list(b.grid),
                "prefix tokens": b.num_prefix_tokens,
                "tokens": b.token_shape.num_tokens,
                "license": encoders[role].license() or b.license,
            }
            for role, b in encoder.backbones.items()
        },
        "schedule": [[[r.start, r.stop] for r in blocks] for blocks in encoder.schedule],
        "adapters after": [int(p) for p in encoder.adapters],
        "taps": list(encoder.taps),
        "decoder joins": spec.decoder.joins(),
        "common grid": list(encoder.grid),
        "resampling": compatibility.resampling(model),
        "projections": compatibility.projections(model),
        "memory": compatibility.memory(model, images),
        "frozen weights": {
            "GiB": frozen_bytes(model) / 2**30,
            "GiB in bfloat16": frozen_bytes(model, torch.bfloat16) / 2**30,
        },
        "time": None
        if gflops is None
        else {"gflops per second here": speed, "seconds at least": gflops / speed},
        "warnings": compatibility.warnings(spec, model),
    }


def render(name: str, facts: dict[str, Any]) -> list[Table | str]:
    """Tables and lines for a terminal."""
    encoders = Table(
        ("", "model", "depth", "width", "patch", "grid", "prefix", "tokens", "license"),
        [
            (
                role,
                str(e["model"]),
                str(e["depth"]),
                str(e["width"]),
                "x".join(map(str, e["patch"])),
                "x".join(map(str, e["grid"])),
                str(e["prefix tokens"]),
                str(e["tokens"]),
                e["license"] or "?",
            )
            for role, e in facts["encoders"].items()
        ],
        title=f"{name}, {facts['image_size'][0]}x{facts['image_size'][1]}",
        left=9,
    )
    whole = {"part": "all", "component": "", **facts}
    parts = Table(
        ("part", "component", "trained", "frozen", "GFLOPs"),
        [
            (
                p["part"],
                p["component"],
                f"{p['trained']:,}",
                f"{p['frozen']:,}",
                _number(p["gflops"]),
            )
            for p in (*facts["parts"], whole)
        ],
        left=2,
        strong="all",
    )
    positions = len(facts["schedule"])
    lines = [f"blocks of a position: {_schedule(facts)}"]
    for what in ("resampling", "projections"):
        lines += [f"{what}: {'; '.join(facts[what]) or 'none'}"]
    trains = [f"{p['part']} {p['trained']:,}" for p in facts["parts"] if p["trained"]]
    lines += [f"trains: {', '.join(trains) or 'nothing'}"]
    read = (
        f"taps after {', '.join(map(str, facts['taps']))} (from 0); pyramid on a "
        f"{facts['common grid'][0]}x{facts['common grid'][1]} grid"
    )
    if facts["decoder joins"]:
        joined = next(iter(facts["encoders"]))
        read = f"the decoder's tokens join the last {facts['decoder joins']} blocks of the {joined}"
    lines += [
        f"{positions} positions; adapters after {_ranges(facts['adapters after'])}; {read}",
        "GFLOPs of one image, forward: 2 x multiply-adds, 1 per activation; the scan's own are "
        "counted with fusion and enhancer"
        if facts["gflops"] is not None
        else "GFLOPs: not available, some operation here cannot be laid out without values",
    ]
    if facts["memory"] is not None:
        parts_of = ", ".join(f"{what} {gib:.2f}" for what, gib in facts["memory"].items())
        total = sum(facts["memory"].values())
        lines.append(f"memory of a training step, one image, float32: {total:.2f} GiB ({parts_of})")
    frozen = facts["frozen weights"]
    if frozen["GiB"]:
        lines.append(
            f"frozen weights: {frozen['GiB']:.2f} GiB as they are, {frozen['GiB in bfloat16']:.2f} "
            "with matrices in bfloat16 (frozen_dtype)"
        )
    if facts["time"] is not None:
        lines.append(
            f"time of one image, forward: at least {facts['time']['seconds at least']:.2g} s here, "
            f"at the {facts['time']['gflops per second here']:,.0f} GFLOP/s of a matrix product"
        )
    lines += [f"warning: {text}" for text in facts["warnings"]]
    return [encoders, parts, *lines]


def _component(chosen: Any) -> str:
    if isinstance(chosen, tuple):
        return ", ".join(map(_component, chosen))
    return getattr(chosen, "name", "")


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _schedule(facts: dict[str, Any]) -> str:
    """ "vfm 1, vlm 2", or "vfm 1, vlm 1 to 2" where they do not divide."""
    counts = zip(
        *([stop - start for start, stop in blocks] for blocks in facts["schedule"]), strict=True
    )
    roles = []
    for role, of_role in zip(facts["encoders"], counts, strict=True):
        low, high = min(of_role), max(of_role)
        roles.append(f"{role} {low}" if low == high else f"{role} {low} to {high}")
    return ", ".join(roles)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _ranges(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
