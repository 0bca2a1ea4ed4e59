"""The time of each part of a model, forward and backward, and the memory it keeps.

One clock runs, for one part at a time. Forward, a part's call starts its time and its return gives
the clock back to whoever called. Backward, the gradient passes through a mark behind the part's
results when its own backward begins, and through marks before its inputs when it is over: autograd
takes the nodes of a single thread in reverse order of their making, so what lies between two marks
belongs to the part between them. What a checkpointed part computes again counts as its backward.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mfuser.model.dgss import DGSSModel
from mfuser.reporting.flops import flop_counter

OTHER = "other"
"""Time outside the parts: concatenations, sums, the loop itself."""


class Stopwatch:
    """seconds, flops: (phase, part) -> sum. saved: part -> bytes kept for the backward pass.

    counting: count FLOPs and saved bytes, which takes time of its own, so in another pass than
    the one that is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase = "forward"
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.flops: dict[tuple[str, str], int] = defaultdict(int)
        self.saved: dict[str, int] = defaultdict(int)
        self._part = OTHER
        self._since = self._now()
        self._counter: FlopCounterMode | None = None
        self._counted = 0

    def switch(self, part: str) -> str:
        """The clock runs for `part` from now on; returns for which it ran."""
        now, before = self._now(), self._part
        self.seconds[self.phase, before] += now - self._since
        if self._counter is not None:
            total = self._counter.get_total_flops()
            self.flops[self.phase, before] += total - self._counted
            self._counted = total
        self._part, self._since = part, self._now()
        return before

    @contextmanager
    def during(self, phase: str, part: str = OTHER) -> Iterator[None]:
        """A phase of a pass, begun in `part`."""
        self.switch(OTHER)
        self.phase = phase
        self.switch(part)
        try:
            yield
        finally:
            self.switch(OTHER)

    def timed(self, phase: str, work: Callable[[], object]) -> float:
        """The seconds that `work` takes, which also count as that phase's."""
        before = sum(self.seconds.values())
        with self.during(phase):
            work()
        return sum(self.seconds.values()) - before

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count FLOPs, and the bytes of tensors saved for the backward pass, each storage once."""
        seen: set[int] = set()
        kept: list[Tensor] = []  # so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and not isinstance(tensor, nn.Parameter):
                seen.add(storage.data_ptr())
                kept.append(tensor)
                self.saved[self._part] += storage.nbytes()
            return tensor

        with (
            flop_counter() as self._counter,
            saved_tensors_hooks(pack, lambda t: t),
        ):
            self._counted = 0
            try:
                yield
            finally:
                self.switch(OTHER)
                self._counter = None

    def watch(self, owner: Any, name: str, part: str | Callable[..., str]) -> None:
        """Time a method of one object. part: its name, or a function of the method's arguments."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            mine = part if isinstance(part, str) else part(*args, **kwargs)
            outer = self.switch(mine)
            try:
                if torch.is_grad_enabled():
                    args = self._marked(args, outer)
                    kwargs = self._marked(kwargs, outer)
                result = method(*args, **kwargs)
                return self._marked(result, mine) if torch.is_grad_enabled() else result
            finally:
                self.switch(outer)

        object.__setattr__(owner, name, timed)

    def _marked(self, value: Any, part: str) -> Any:
        """The same tensors; the gradient on its way back through them sets the clock to `part`."""
        if isinstance(value, Tensor):
            return _Mark.apply(value, self, part) if value.requires_grad else value
        if isinstance(value, dict):
            return {k: self._marked(v, part) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._marked(v, part) for v in value)
        if is_dataclass(value) and not isinstance(value, type):
            marked = {f.name: self._marked(getattr(value, f.name), part) for f in fields(value)}
            return replace(value, **marked)
        return value

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, watch: Stopwatch, part: str) -> Tensor:
        ctx.watch, ctx.part = watch, part
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.watch.switch(ctx.part)
        return gradients[0], None, None


def watch_model(model: DGSSModel, watch: Stopwatch) -> list[str]:
    """Time the parts of a model; their names in the order in which they run."""
    encoder = model.encoder
    roles = {id(backbone): role for role, backbone in encoder.backbones.items()}

    def role_of(backbone: object, *_: Any) -> str:
        return roles[id(backbone)]

    for name in ("_embed", "_step", "_finish", "_project"):
        watch.watch(encoder, name, role_of)
    parts = [*encoder.backbones]
    if encoder.adapters:
        watch.watch(encoder, "_fuse", "fusion")
        parts.append("fusion")
    if encoder.vlm is not None:
        watch.watch(model, "text", "text tower")
        parts.append("text tower")
        watch.watch(model.enhancer, "forward", "enhancer")
        parts.append("enhancer")
    watch.watch(model.pyramid, "forward", "pyramid")
    parts.append("pyramid")
    pixels = getattr(model.decoder, "pixel_decoder", None)
    if isinstance(pixels, nn.Module):
        watch.watch(pixels, "forward", "pixel decoder")
        parts.append("pixel decoder")
    decoder = "mask decoder" if isinstance(pixels, nn.Module) else "decoder"
    watch.watch(model.decoder, "forward", decoder)
    watch.watch(model.decoder, "semantic_logits", decoder)
    watch.watch(model, "losses", "losses")
    return [*parts, decoder, "losses"]


def modules_of(model: DGSSModel, part: str) -> list[nn.Module]:
    """The modules whose parameters belong to a part."""
    encoder = model.encoder
    if part in encoder.backbones:
        return [encoder.backbones[part]]
    pixels = getattr(model.decoder, "pixel_decoder", None)
    found: dict[str, object] = {
        "fusion": encoder.adapters,
        "enhancer": model.enhancer,
        "pyramid": model.pyramid,
        "pixel decoder": pixels,
        "mask decoder": model.decoder,
        "decoder": model.decoder,
    }
    module = found.get(part)
    return [module] if isinstance(module, nn.Module) else []
