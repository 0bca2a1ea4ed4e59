"""Faults of plugins that raise no error, found before the first step with one image of noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mfuser.engine.compiling import uncompiled
from mfuser.engine.watch import Call, components, tensors, watched
from mfuser.errors import MFuserError, PluginError, out_of_memory
from mfuser.model.dgss import DGSSModel
from mfuser.plugins.blame import raised_in
from mfuser.plugins.contracts import named


def check_parts(model: DGSSModel, device: torch.device) -> None:
    """Segment one image of noise and look on. The model and the generators stay as they are.

    Raises PluginError naming the component that changes in place what others read too, raises, or
    gives class scores of another shape, and the adapters where none of them returns anything.
    """
    silent = {name for name in components(model) if name.startswith("encoder.adapters.")}
    adapters = len(silent)
    copies: dict[int, list[Tensor]] = {}

    def before(call: Call, given: list[Tensor]) -> None:
        if call.whole:
            copies[len(stack)] = [tensor.clone() for tensor in given]

    def after(call: Call, given: list[Tensor], result: Any) -> None:
        if not call.whole:
            return
        if not all(_same(*pair) for pair in zip(copies.pop(len(stack)), given, strict=True)):
            raise PluginError(
                f"{named(call.part)}: {_shown(call)} changes in place what it is given, which "
                "other parts read too; replace += and methods that end in _ by expressions"
            )
        if tensors(result):
            silent.discard(call.name)

    modes = {module: module.training for module in model.modules()}
    size = model.spec.image_size
    stack: list[Call] = []
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            image = torch.rand(1, 3, *size).to(device)
            model.eval()
            with uncompiled(model), watched(model, before, after) as stack, _blamed(stack):
                model.scores(image)
    finally:
        for module, training in modes.items():
            module.training = training
    if adapters and len(silent) == adapters:
        part = components(model)[min(silent)]
        raise PluginError(
            f"{named(part)}: forward() returns (None, None) at all {adapters} positions, so "
            'nothing is fused; return the offsets, or set fusion = "none"'
        )


@contextlib.contextmanager
def _blamed(stack: list[Call]) -> Iterator[None]:
    """Reports an exception of a component in a sentence that names it and its own line."""
    try:
        yield
    except MFuserError:
        raise
    except Exception as error:
        inside = [call for call in stack if call.whole]
        if not inside or out_of_memory(error):
            raise
        part = inside[-1].part
        line = raised_in(error, type(part).__module__.split(".")[0])
        raise PluginError(
            f"{named(part)}: {_shown(inside[-1])} raised {type(error).__name__}: {error}"
            + (f" ({line})" if line else "")
        ) from error


def _shown(call: Call) -> str:
    last = call.name.split(".")[-1]
    return last if "(" in last else "forward()"


def _same(before: Tensor, now: Tensor) -> bool:
    return bool(((before == now) | (before.isnan() & now.isnan())).all())
