"""Backend `cpu`: vector code for this processor, compiled by LLVM (llvmlite, from pip)."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from mfuser_kernels.scan.inputs import ScanInputs


def unusable() -> str:
    if importlib.util.find_spec("llvmlite") is None:
        return 'llvmlite is not installed: pip install "mfuser[cpu]"'
    return ""


def refuses(device: str, dtype: torch.dtype, initial_state: bool) -> str:
    if device != "cpu":
        return f"its kernels run on the CPU, the inputs are on {device}"
    if dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    return ""


def saved_shape(x: ScanInputs) -> tuple[int, ...]:
    from mfuser_kernels.scan.cpu import run

    return run.saved_shape(x)


def forward(x: ScanInputs, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    from mfuser_kernels.scan.cpu import run

    return run.forward(x, training)


def backward(
    x: ScanInputs, d_out: Tensor | None, d_last_state: Tensor | None, saved: Tensor
) -> list[Tensor | None]:
    from mfuser_kernels.scan.cpu import run

    return run.backward(x, d_out, d_last_state, saved)
