"""The backends: which exist, which can run on this machine, and which one `auto` picks."""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from mfuser_kernels.errors import ScanError

ENVIRONMENT = "MFUSER_SCAN_BACKEND"
# A module is imported when its backend is first inspected.
MODULES = {
    "triton": "mfuser_kernels.scan.gpu",
    "mamba_ssm": "mfuser_kernels.scan.mamba",
    "cpu": "mfuser_kernels.scan.cpu",
    "chunked": "mfuser_kernels.scan.chunked",
    "reference": "mfuser_kernels.scan.reference",
    "associative": "mfuser_kernels.scan.associative",
}
AUTO = ("triton", "mamba_ssm", "cpu", "chunked")  # in order of preference


@dataclass(frozen=True)
class Backend:
    """One implementation of the scan and, if it cannot run on this machine, the reason."""

    name: str
    usable: bool
    reason: str


def module(name: str, asked: str = "backend") -> ModuleType:
    """The module of a backend.

    Each has `unusable() -> str`, the reason why it cannot run on this machine, and
    `refuses(device, dtype, initial_state) -> str`, the reason why it cannot run such inputs; both
    are empty if it can.
    `reference`, `associative` and `mamba_ssm` have `scan(x) -> (out, last_state)`; the others
    have `saved_shape(x)`, `forward(x, training) -> (out, last_state, saved)` and
    `backward(x, d_out, d_last_state, saved) -> nine gradients`.
    """
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1)
        hint = f", did you mean {near[0]!r}" if near else ""
        raise ScanError(f"{asked} is unknown{hint}; available: auto, {', '.join(MODULES)}")
    return importlib.import_module(MODULES[name])


def backends() -> list[Backend]:
    """Every backend: whether it can run on this machine and, if not, the reason."""
    found = []
    for name in MODULES:
        reason = module(name).unusable()
        found.append(Backend(name, not reason, reason))
    return found


def choose(backend: str, device: str, dtype: torch.dtype, initial_state: bool) -> str:
    """The backend that runs such inputs; ScanError if the one asked for cannot."""
    asked = f"backend {backend!r}"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT, "").strip() or "auto"
        asked = f"{ENVIRONMENT}={backend!r}"
    if backend != "auto":
        chosen = module(backend, asked)
        reason = chosen.unusable() or chosen.refuses(device, dtype, initial_state)
        if reason:
            raise ScanError(f"{asked} cannot run this scan: {reason}")
        return backend
    if _exporting():
        return "associative"
    for name in AUTO:
        candidate = module(name)
        if not candidate.refuses(device, dtype, initial_state) and not candidate.unusable():
            return name
    return "chunked"


def _exporting() -> bool:
    """Whether torch.export is tracing: its programs know no operator of ours."""
    asks = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
    return bool(asks and asks())


# torch.compile treats the choice as a constant. torch.compiler.assume_constant_result does no more
# than this, but calling it here would import torch._dynamo, which takes over a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
