"""The cost of a fusion adapter by itself: parameters, FLOPs, time, memory, growth with length.

Any fusion component can be measured, third-party ones too; no encoder, weights or data are needed.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfuser.errors import MFuserError
from mfuser.interfaces import FusionAdapter, ManyFusionAdapter
from mfuser.reporting.flops import count_flops
from mfuser.specs import FusionSpec, Options, TokenShape

Adapter = FusionAdapter | ManyFusionAdapter
Offsets = Sequence[Tensor | None]

REPEATS = 5
"""Passes that are timed, at least."""
WARM = 0.3
"""Seconds of passes before timing starts, and of timed passes at least."""
ENOUGH = 10.0
"""Seconds of timing after which fewer passes will do."""


class Seconds(Options):
    """The 20th, 50th and 80th percentile of repeated passes."""

    p20: float
    p50: float
    p80: float


class AdapterCost(Options):
    """One adapter at one length.

    tokens: of all encoders together. flops: of a forward pass, the whole batch, as `flops` counts
    them; scan_flops: those of operators that PyTorch lacks. forward: in evaluation, without
    gradients. backward: the backward pass alone. peak_bytes: what a training
    pass holds beyond the adapter and its input; None where the platform does not tell.
    """

    adapter: str
    batch: int
    tokens: int
    params: int
    flops: int | None
    scan_flops: int | None
    forward: Seconds
    backward: Seconds | None = None
    peak_bytes: int | None = None

    @property
    def seconds_a_token(self) -> float:
        return self.forward.p50 / (self.batch * self.tokens)


class Growth(Options):
    """Forward time over length. exponent: of time ~ tokens ** exponent, fitted to `fitted` points.
    stopped: why the longer ones were not measured."""

    adapter: str
    points: list[AdapterCost]
    exponent: float | None
    fitted: int
    stopped: str | None = None


def adapter_cost(
    spec: FusionSpec,
    label: str = "",
    *,
    width: int = 1024,
    grid: tuple[int, int] = (36, 36),
    prefix: int = 1,
    encoders: int = 2,
    batch: int = 2,
    device: str = "cpu",
    backward: bool = True,
    repeats: int = REPEATS,
) -> AdapterCost:
    """Build one adapter between encoders of `width`, and measure it on random tokens.

    The defaults are the paper's (table 3): a 512x512 image in patches of 14 and one class token.
    Raises MFuserError for a component that builds no adapter, or that cannot take such tokens.
    """
    shape = TokenShape(width, grid, prefix)
    label = label or spec.component()
    adapter = _built(spec, shape, label, device, encoders)
    params = sum(p.numel() for p in adapter.parameters())
    flops, scan_flops = _flops(spec, shape, batch, label, encoders)
    tokens = [torch.randn(batch, shape.num_tokens, width, device=device) for _ in range(encoders)]

    def forward() -> Offsets:
        return _called(adapter, tokens, grid)

    adapter.eval()
    with torch.no_grad():
        ahead = _timed(forward, repeats, device)
    back, peak = None, None
    if backward:
        adapter.train()
        for given in tokens:
            given.requires_grad_()
        back, peak = _training_pass(forward, repeats, device)
    return AdapterCost(
        adapter=label,
        batch=batch,
        tokens=encoders * shape.num_tokens,
        params=params,
        flops=flops,
        scan_flops=scan_flops,
        forward=ahead,
        backward=back,
        peak_bytes=peak,
    )


def growth(
    spec: FusionSpec,
    label: str = "",
    *,
    tokens: Sequence[int],
    limit: float = 60.0,
    width: int = 1024,
    encoders: int = 2,
    batch: int = 2,
    device: str = "cpu",
    on_point: Callable[[AdapterCost], None] | None = None,
) -> Growth:
    """Forward time at each number of patch tokens per encoder, as long as a pass stays in `limit`
    seconds, and the exponent that the longer ones follow."""
    label = label or spec.component()
    points: list[AdapterCost] = []
    stopped = None
    for count in sorted(tokens):
        expected = _expected(points, encoders * count)
        if expected > limit:
            stopped = (
                f"stopped before {encoders * count:,} tokens: a pass would take about "
                f"{expected:.0f} s, over {limit:g} s"
            )
            break
        point = adapter_cost(
            spec,
            label,
            width=width,
            grid=square(count),
            prefix=0,
            encoders=encoders,
            batch=batch,
            device=device,
            backward=False,
            repeats=1 if expected > ENOUGH else REPEATS,
        )
        points.append(point)
        if on_point is not None:
            on_point(point)
    # Short passes are overhead: the exponent is that of the upper half.
    longer = points[-max(3, math.ceil(len(points) / 2)) :]
    return Growth(
        adapter=label,
        points=points,
        exponent=exponent([(p.tokens, p.forward.p50) for p in longer]),
        fitted=len(longer),
        stopped=stopped,
    )


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log(time) over log(length), by least squares; None below two points."""
    if len(points) < 2:
        return None
    x, y = np.log(np.asarray(points, float)).T
    return float(np.polyfit(x, y, 1)[0])


def square(tokens: int) -> tuple[int, int]:
    """The grid (h, w) of that many patches that is nearest to a square."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return height, tokens // height


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine that figures were taken on: without it a time means nothing."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if hasattr(os, "getloadavg"):
        facts["load before"] = round(os.getloadavg()[0], 1)
    return facts


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def layout(spec: FusionSpec, shape: TokenShape, label: str = "", encoders: int = 2) -> None:
    """Raises MFuserError where the component builds no adapter for such tokens; takes no memory."""
    try:
        _built(spec, shape, label or spec.component(), "meta", encoders)
    except (NotImplementedError, RuntimeError):
        # It computes with values while it is built; the measurement will tell.
        return


def _built(spec: FusionSpec, shape: TokenShape, label: str, device: str, encoders: int) -> Adapter:
    if encoders > 2 and not spec.any_number:
        raise MFuserError(f"'{label}' joins two encoders, not {encoders}")
    adapter: Adapter | None
    with torch.device(device):
        if encoders == 2:
            adapter = spec.build(shape, shape)
        else:
            roles = [*(f"vfm_{i}" for i in range(1, encoders)), "vlm"]
            adapter = spec.build_many(dict.fromkeys(roles, shape))
    if adapter is None:
        raise MFuserError(f"'{label}' puts no adapter between the encoders: nothing to measure")
    return adapter


def _called(adapter: Adapter, tokens: list[Tensor], grid: tuple[int, int]) -> Offsets:
    grids = [grid] * len(tokens)
    if isinstance(adapter, ManyFusionAdapter):
        offsets: Offsets = adapter(tokens, grids)
    else:
        offsets = adapter(*tokens, *grids)
    return offsets


def _flops(
    spec: FusionSpec, shape: TokenShape, batch: int, label: str, encoders: int
) -> tuple[int | None, int | None]:
    """FLOPs of PyTorch's own operators and of added ones, laid out without values."""
    adapter = _built(spec, shape, label, "meta", encoders).eval()
    size = (batch, shape.num_tokens, shape.embed_dim)
    tokens = [torch.empty(size, device="meta") for _ in range(encoders)]
    counted = count_flops(lambda: _called(adapter, tokens, shape.grid))
    return (None, None) if counted is None else (counted.total - counted.added, counted.added)


def _timed(work: Callable[[], Any], repeats: int, device: str) -> Seconds:
    begun = _now(device)
    while repeats > 1:
        work()  # the first pass compiles, later ones fill caches and wake the processor
        if _now(device) - begun > WARM:
            break
    taken: list[float] = []
    while not taken or (repeats > 1 and sum(taken) < WARM) or len(taken) < repeats:
        if sum(taken) > ENOUGH:
            break
        begun = _now(device)
        work()
        taken.append(_now(device) - begun)
    return _percentiles(taken)


def _training_pass(
    forward: Callable[[], Offsets], repeats: int, device: str
) -> tuple[Seconds, int | None]:
    taken: list[float] = []
    peak: int | None = None
    for k in range(repeats + 1):
        watch = _Memory(device) if k == 1 else None
        outputs = [o for o in forward() if o is not None]
        total = torch.stack([o.sum() for o in outputs]).sum()
        begun = _now(device)
        total.backward()
        seconds = _now(device) - begun
        if watch is not None:
            peak = watch.peak()
        del outputs, total
        if k:  # the first pass compiles and fills caches
            taken.append(seconds)
        if taken and sum(taken) > ENOUGH:
            break
    return _percentiles(taken), peak


def _percentiles(taken: Sequence[float]) -> Seconds:
    low, middle, high = np.percentile(taken, (20, 50, 80)).tolist()
    return Seconds(p20=low, p50=middle, p80=high)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _expected(points: Sequence[AdapterCost], tokens: int) -> float:
    """Seconds of a pass at the next length, from the last two; at least linear."""
    if not points:
        return 0.0
    last = points[-1]
    slope = exponent([(p.tokens, p.forward.p50) for p in points[-2:]]) or 1.0
    return last.forward.p50 * float((tokens / last.tokens) ** min(max(slope, 1.0), 2.0))


class _Memory:
    """The highest mark of memory above where it was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        if sys.platform == "linux":
            # Memory that malloc keeps for later would hide what the pass asks for.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.before = -1
            return
        self.before = _resident("VmRSS")

    def peak(self) -> int | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return None if self.before < 0 else max(0, _resident("VmHWM") - self.before)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
