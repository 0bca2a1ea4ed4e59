"""Backend `mamba_ssm`: the CUDA kernel of the mamba-ssm package, where that is installed."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from mfuser_kernels.scan.inputs import ScanInputs

MODULE = "mamba_ssm.ops.selective_scan_interface"


@cache
def unusable() -> str:
    """mamba-ssm may be installed and still not import: it then lacks its compiled part."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return 'mamba-ssm is not installed (it is never needed): pip install "mfuser[mamba]"'
    try:
        module = importlib.import_module(MODULE)
    except Exception as error:  # whatever its import raises, it cannot be used
        return f"mamba-ssm does not import: {type(error).__name__}: {error}"
    if getattr(module, "selective_scan_cuda", None) is None:
        return "mamba-ssm was built without its CUDA kernel selective_scan_cuda"
    return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"


def refuses(device: str, dtype: torch.dtype, initial_state: bool) -> str:
    if device != "cuda":
        return f"its kernel runs on a GPU, the inputs are on {device}"
    if dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    return "it takes no initial state" if initial_state else ""


def scan(x: ScanInputs) -> tuple[Tensor, Tensor]:
    """Its layout is (B, D, L); it wants one dtype for u, delta, z and float32 for A, D, bias."""
    selective_scan_fn = importlib.import_module(MODULE).selective_scan_fn
    B, C = (m.float() if m.dim() == 2 else m.permute(0, 2, 3, 1).contiguous() for m in (x.B, x.C))
    out, last_state = selective_scan_fn(
        x.u.transpose(1, 2).contiguous(),
        x.delta.to(x.u.dtype).transpose(1, 2).contiguous(),
        x.A.float(),
        B,
        C,
        None if x.D is None else x.D.float(),
        None if x.z is None else x.z.to(x.u.dtype).transpose(1, 2).contiguous(),
        None if x.delta_bias is None else x.delta_bias.float(),
        x.delta_softplus,
        True,
    )
    return out.transpose(1, 2), last_state
