"""Backend `triton`: chunk-parallel kernels for NVIDIA and AMD GPUs."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from mfuser_kernels.scan.inputs import ScanInputs


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors, as in tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unusable() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux, with a GPU build of torch)"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no CUDA or ROCm GPU"
    return ""


def refuses(device: str, dtype: torch.dtype, initial_state: bool) -> str:
    if device != "cuda" and not interpreted():
        return f"its kernels run on a GPU, the inputs are on {device}"
    if dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    return ""


def saved_shape(x: ScanInputs) -> tuple[int, ...]:
    from mfuser_kernels.scan.gpu import launch

    return launch.saved_shape(x)


def forward(x: ScanInputs, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    from mfuser_kernels.scan.gpu import launch

    return launch.forward(x, training)


def backward(
    x: ScanInputs, d_out: Tensor | None, d_last_state: Tensor | None, saved: Tensor
) -> list[Tensor | None]:
    from mfuser_kernels.scan.gpu import launch

    return launch.backward(x, d_out, d_last_state, saved)
