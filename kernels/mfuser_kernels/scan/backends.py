"""Which backends there are, which can run here, and which one `auto` takes."""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from mfuser_kernels.errors import ScanError

ENVIRONMENT = "MFUSER_SCAN_BACKEND"
# A module is imported when its backend is first looked at.
MODULES = {
    "triton": "mfuser_kernels.scan.gpu",
    "mamba_ssm": "mfuser_kernels.scan.mamba",
    "cpu": "mfuser_kernels.scan.cpu",
    "chunked": "mfuser_kernels.scan.chunked",
    "reference": "mfuser_kernels.scan.reference",
    "associative": "mfuser_kernels.scan.associative",
}
AUTO = ("triton", "mamba_ssm", "cpu", "chunked")  # in the order of preference


@dataclass(frozen=True)
class Backend:
    """One way to run the scan, and why it cannot run here if it cannot."""

    name: str
    usable: bool
    reason: str


def module(name: str, asked: str = "backend") -> ModuleType:
    """The module of a backend.

    Each has `unusable() -> str`, the reason why it cannot run on this machine, and
    `refuses(device, dtype, initial_state) -> str`, why it cannot run such inputs; empty if it can.
    `reference` and `mamba_ssm` have `scan(x) -> (out, last_state)`; the others have
    `saved_shape(x)`, `forward(x, training) -> (out, last_state, saved)` and
    `backward(x, d_out, d_last_state, saved) -> nine gradients`.
    """
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1)
        hint = f", did you mean {near[0]!r}" if near else ""
        raise ScanError(f"{asked} is not known{hint}; there are: auto, {', '.join(MODULES)}")
    return importlib.import_module(MODULES[name])


def backends() -> list[Backend]:
    """Every backend with whether it can run on this machine, and the reason if not."""
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


# torch.compile takes the choice as a constant. This is all that torch.compiler's decorator
# assume_constant_result does, but calling that here would import torch._dynamo, over a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
