"""FLOPs of a pass: the one place that says what counts.

2 x multiply-adds of projections, convolutions and attention products, and 1 per activation, as
the paper's profiler (DeepSpeed's) counts; operators that PyTorch lacks (the selective scan) count
themselves and can be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

ACTIVATIONS = (torch.ops.aten.silu, torch.ops.aten.gelu, torch.ops.aten.relu)
DEPTH = 4
"""Levels of submodules that are reported apart."""


@dataclass(frozen=True)
class Flops:
    """counts: module path -> operator -> FLOPs; "Global" is everything."""

    counts: dict[str, dict[Any, int]]

    @property
    def total(self) -> int:
        return sum(self.counts.get("Global", {}).values())

    @property
    def added(self) -> int:
        """FLOPs of operators that are not PyTorch's own."""
        of_all = self.counts.get("Global", {})
        return sum(n for op, n in of_all.items() if not str(op).startswith("aten."))

    def below(self, path: str) -> int:
        """FLOPs of a module, by its path from the class that was called ("DGSSModel.decoder").

        Encoders are stepped block by block, so their blocks are counted, not they themselves.
        """
        if own := self.counts.get(path):
            return sum(own.values())
        inside = [n for n in self.counts if n.startswith(f"{path}.")]
        outer = [n for n in inside if not any(n != m and n.startswith(m + ".") for m in inside)]
        return sum(sum(self.counts[n].values()) for n in outer)


def flop_counter(depth: int = DEPTH) -> FlopCounterMode:
    """PyTorch's, which also counts activations."""
    activations = dict.fromkeys(ACTIVATIONS, _one_each)
    return FlopCounterMode(display=False, depth=depth, custom_mapping=activations)


def count_flops(work: Callable[[], Any]) -> Flops | None:
    """FLOPs of `work`, which runs modules on the meta device, without gradients.

    None if an operation's size depends on values, which are not there.
    """
    try:
        with torch.no_grad(), flop_counter() as counter:
            work()
    except (NotImplementedError, RuntimeError, AssertionError):  # the counter's own, too
        return None
    return Flops(counter.get_flop_counts())


def _one_each(shape: Any, *_: Any, **__: Any) -> int:
    return math.prod(shape)
