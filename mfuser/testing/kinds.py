"""Checks of backbones alone, and of decoders alone."""

from __future__ import annotations

import torch
from torch import nn

from mfuser.errors import MFuserError
from mfuser.testing.bench import BackboneBench, Bench, DecoderBench
from mfuser.testing.compare import widest_gap
from mfuser.testing.modules import CLOSE, first, module_of
from mfuser.testing.verdict import Broken, NotTried


def frozen(bench: Bench) -> str:
    """A frozen backbone: trained tensors, statistics, sizes"""
    assert isinstance(bench, BackboneBench)
    case = first(bench)
    module = module_of(bench, case)
    if not bench.spec.freeze:
        raise NotTried("freeze = false in its tiny options")
    trains = [
        n
        for n, p in module.named_parameters()
        if p.requires_grad and not n.startswith(module.always_trains)
    ]
    if trains:
        raise Broken(
            "freeze = true",
            f"{len(trains)} tensors train, e.g. '{trains[0]}'",
            "none",
            "call module.requires_grad_(False) in build() if self.freeze; what is new and "
            'always trains is named by the class: always_trains = ("projection",)',
        )
    for name in ("mean", "std"):
        value = getattr(module, name)
        if tuple(value.shape) != (1, 3, 1, 1):
            raise Broken(
                f"the buffer '{name}'",
                f"shape {tuple(value.shape)}",
                "(1, 3, 1, 1)",
                "call self.set_statistics(mean, std) with three numbers each",
            )
    if tuple(module.image_size) != tuple(case):
        raise Broken(
            f"build(image_size={case})",
            f"image_size is {tuple(module.image_size)}",
            f"{case}",
            "set self.image_size in resize()",
        )
    return "nothing in it trains with freeze = true"


def resizing(bench: Bench) -> str:
    """Images of a wrong size; another size and back"""
    assert isinstance(bench, BackboneBench)
    case, *others = bench.cases()
    module = module_of(bench, case)
    wrong = torch.rand(1, 3, case[0] * 2, case[1])
    try:
        with torch.no_grad():
            module.embed(wrong)
    except MFuserError:
        pass
    else:
        raise Broken(
            f"embed() of images of {tuple(wrong.shape)} where {case} is set",
            "they were taken",
            "MFuserError that gives both sizes",
            "compare images.shape[-2:] with self.image_size at the top of embed()",
        )
    inputs = bench.feed(case)
    with torch.no_grad():
        before = bench.call(module, inputs)
        done = []
        for other in others:
            try:
                module.resize(other)
            except MFuserError:
                continue  # refused with a reason
            fresh = bench.build(other)
            if tuple(module.grid) != tuple(fresh.grid):
                raise Broken(
                    f"resize({other})",
                    f"grid {module.grid}",
                    f"{fresh.grid}, as built for it",
                    "set self.grid and self.image_size in resize()",
                )
            bench.call(module, bench.feed(other))
            done.append(other)
        module.resize(case)
        gap = widest_gap(before, bench.call(module, inputs), CLOSE)
    if gap:
        raise Broken(
            f"resize() to {done} and back to {case}",
            f"{gap[0]} differs by {gap[1]:.2g} (relative)",
            "the same as before: positions are resampled from the original table",
            "keep the table as loaded, and resample from it on every resize()",
        )
    return f"a wrong size is refused; {', '.join(f'{h}x{w}' for h, w in done)} and back agree"


def losses(bench: Bench) -> str:
    """Losses of labels with every class, one class, and none"""
    assert isinstance(bench, DecoderBench)
    for case in bench.cases():
        module = module_of(bench, case).train()
        for what, value in (("every class", None), ("one class", 0), ("nothing but ignored", 255)):
            inputs = bench.feed(case)
            if value is not None:
                inputs["labels"] = torch.full_like(inputs["labels"], value)
            found = bench.losses(module, inputs)
            tried = f"{bench.describe(case)}; labels of {what}"
            for name, loss in found.items():
                if loss.dim() or not loss.isfinite():
                    raise Broken(
                        tried,
                        f"'{name}' is {loss.tolist()}"
                        if loss.numel() < 5
                        else f"'{name}' has shape {tuple(loss.shape)}",
                        "a finite scalar",
                        "divide by the number of valid pixels, clamped to at least 1",
                    )
            again = bench.losses(module, inputs)
            if value is None and not isinstance(module, nn.Identity):
                stochastic = any(isinstance(m, nn.Dropout) and m.p for m in module.modules())
                gap = widest_gap(found, again, CLOSE)
                if gap and not stochastic:
                    raise Broken(
                        f"{tried}, twice from one seed",
                        f"'{gap[0]}' differs",
                        "the same",
                        "draw points with torch's generator",
                    )
    return "finite for labels of every class, of one, and of ignored pixels alone"
