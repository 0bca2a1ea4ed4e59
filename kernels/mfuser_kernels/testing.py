"""Inputs and error measures shared by the tests and the benchmarks of the scan."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mfuser_kernels.scan.api import selective_scan

GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def scan_inputs(
    batch: int = 2,
    length: int = 65,
    width: int = 16,
    states: int = 8,
    *,
    groups: int | None = None,
    constant: str = "",
    skip: bool = True,
    gate: bool = True,
    bias: bool = True,
    softplus: bool = True,
    start: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a scan in layout "bld", with Mamba's initial A and delta (its section 3.6).

    `constant` names the matrices that are constant over time ("B", "C" or "BC"); `groups` is the
    number of groups of B and C, None for the three-axis form.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    matrix = (batch, length, states) if groups is None else (batch, length, groups, states)
    step = torch.exp(torch.rand(width, generator=random) * math.log(100) + math.log(1e-3))
    step_bias = inverse_softplus(step)
    delta = 0.5 * normal(batch, length, width)
    if not bias:
        delta = delta + step_bias
    if not softplus:
        delta = 0.05 * delta.abs()
        step_bias = step
    inputs: dict[str, Any] = {
        "u": normal(batch, length, width).to(dtype),
        "delta": delta.to(dtype),
        "A": -torch.arange(1.0, states + 1).repeat(width, 1)
        * torch.exp(0.1 * normal(width, states)),
        "B": normal(width, states) if "B" in constant else normal(*matrix).to(dtype),
        "C": normal(width, states) if "C" in constant else normal(*matrix).to(dtype),
    }
    if skip:
        inputs["D"] = 1 + 0.1 * normal(width)
    if gate:
        inputs["z"] = normal(batch, length, width).to(dtype)
    if bias:
        inputs["delta_bias"] = step_bias
    if start:
        inputs["initial_state"] = normal(batch, width, states)
    inputs = {name: t.to(device) for name, t in inputs.items()}
    return {**inputs, "delta_softplus": softplus, "layout": "bld"}


def inverse_softplus(step: Tensor) -> Tensor:
    """The delta whose softplus is `step`."""
    return step + torch.log(-torch.expm1(-step))


def run_scan(
    inputs: dict[str, Any], backend: str, dtype: torch.dtype | None = None, state_grad: bool = True
) -> dict[str, Tensor]:
    """Outputs "out" and "last_state", and the gradient of a fixed random sum of both, by name.

    With `dtype`, every tensor is converted first: rounded inputs, computed in a higher precision.
    """
    leaves: dict[str, Any] = {
        name: t.detach().to(dtype or t.dtype).requires_grad_() if isinstance(t, Tensor) else t
        for name, t in inputs.items()
    }
    out, last_state = selective_scan(**leaves, return_last_state=True, backend=backend)
    random = torch.Generator().manual_seed(1)
    loss = (out.double() * torch.randn(out.shape, generator=random).to(out.device)).sum()
    if state_grad:
        weight = torch.randn(last_state.shape, generator=random).to(out.device)
        loss = loss + (last_state.double() * weight).sum()
    loss.backward()
    found = {"out": out.detach(), "last_state": last_state.detach()}
    for name in GRADIENTS:
        if name in inputs:
            found[f"grad {name}"] = leaves[name].grad
    return found


def relative_rms(x: Tensor, exact: Tensor) -> float:
    """RMS of the difference over RMS of the exact values; 0 where both are all zero."""
    x, exact = x.double().cpu(), exact.double().cpu()
    error, size = (x - exact).square().mean().sqrt(), exact.square().mean().sqrt()
    return 0.0 if error == 0 else float(error / size)


def errors(
    inputs: dict[str, Any],
    backend: str,
    state_grad: bool = True,
    exact: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Relative RMS error of each output and gradient against the reference in float64.

    To compare several backends, pass the result of `run_scan` for the reference as `exact`.
    """
    exact = exact or run_scan(inputs, "reference", torch.float64, state_grad)
    found = run_scan(inputs, backend, None, state_grad)
    return {name: relative_rms(found[name], exact[name]) for name in exact}
