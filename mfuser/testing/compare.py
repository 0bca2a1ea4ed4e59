"""Comparisons that several checks make."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mfuser.testing.verdict import Broken


def require_finite(outputs: dict[str, Tensor], tried: str, fix: str) -> None:
    """Raises Broken for the first output with NaN or infinity."""
    for name, value in outputs.items():
        if not value.isfinite().all():
            raise Broken(tried, f"{name} has NaN or infinity", "finite numbers", fix)


def require_gradients(module: nn.Module, tried: str, nonzero: bool = False) -> None:
    """Raises Broken for the first trained tensor without a finite gradient.

    nonzero: a gradient of zeros alone does not do either.
    """
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if p.grad is None or (nonzero and not p.grad.any()):
            raise Broken(
                tried,
                f"no gradient reaches '{name}'",
                "a gradient in everything that trains: optimizers and several GPUs rely on it",
                "use it in forward(), remove it, or requires_grad_(False)",
            )
        if not p.grad.isfinite().all():
            raise Broken(
                tried,
                f"the gradient of '{name}' is not finite",
                "finite numbers",
                "look for sqrt(0), norms of zero and logarithms",
            )


def widest_gap(
    a: dict[str, Tensor], b: dict[str, Tensor], allowed: float = 0
) -> tuple[str, float] | None:
    """The first output that differs by more than `allowed`, relative to its largest value."""
    for name, value in a.items():
        other = b[name]
        if value.shape != other.shape:
            return name, float("inf")
        scale = value.detach().abs().max().clamp(min=1e-6) if value.numel() else 1.0
        worst = float((value - other).detach().abs().max() / scale) if value.numel() else 0.0
        if not worst <= allowed:
            return name, worst
    return None


def one_of(inputs: Any, index: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[index : index + 1]
    if isinstance(inputs, dict):
        return {k: v if k == "grids" else one_of(v, index) for k, v in inputs.items()}
    if isinstance(inputs, list):
        return [one_of(v, index) for v in inputs]
    return inputs


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
