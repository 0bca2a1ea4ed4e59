"""The inputs of a backend: checked tensors in one layout.

Glossary of the shapes in this package: B batch, L sequence, D width (channels), N state,
G groups of channels that share B and C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfuser_kernels.errors import ScanError

LOG2_E = 1.4426950408889634  # decays are computed as 2^(delta A log2(e))
TENSORS = 9  # fields of ScanInputs that are tensors: the first nine
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class ScanInputs:
    """Arguments of one scan in the layout (B, L, D); `check` has passed."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D)
    A: Tensor  # (D, N)
    B: Tensor  # (D, N) or (B, L, G, N)
    C: Tensor  # (D, N) or (B, L, G, N), the same G as B
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, L, D)
    delta_bias: Tensor | None  # (D,)
    initial_state: Tensor | None  # (B, D, N)
    delta_softplus: bool

    @property
    def batch(self) -> int:
        return self.u.shape[0]

    @property
    def length(self) -> int:
        return self.u.shape[1]

    @property
    def width(self) -> int:
        return self.u.shape[2]

    @property
    def states(self) -> int:
        return self.A.shape[1]

    @property
    def groups(self) -> int:
        return max((m.shape[2] for m in (self.B, self.C) if m.dim() == 4), default=1)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The nine differentiable arguments, in the order of the operator."""
        return (
            self.u,
            self.delta,
            self.A,
            self.B,
            self.C,
            self.D,
            self.z,
            self.delta_bias,
            self.initial_state,
        )


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _check_kind(tensors: dict[str, Tensor | None], u: Tensor) -> None:
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise ScanError(f"{name} must be a torch tensor, got {type(t).__name__}")
        if t.is_complex():
            raise ScanError(f"{name} is complex ({t.dtype}), only real scans are supported")
        if t.dtype not in DTYPES:
            raise ScanError(
                f"{name} has dtype {t.dtype}, expected float32, bfloat16, float16 or float64"
            )
        if t.device != u.device:
            raise ScanError(
                f"{name} is on {t.device} but u is on {u.device}, move both to one device"
            )


def check(tensors: dict[str, Tensor | None], layout: str) -> None:
    """Raise ScanError, naming the argument and both shapes, unless the arguments fit together."""
    if layout not in ("bdl", "bld"):
        raise ScanError(f"layout is {layout!r}, expected 'bdl' or 'bld'")
    u, A = tensors["u"], tensors["A"]
    if not isinstance(u, Tensor) or not isinstance(A, Tensor):
        raise ScanError("u and A must be torch tensors")
    _check_kind(tensors, u)
    axes = "(B, D, L)" if layout == "bdl" else "(B, L, D)"
    if u.dim() != 3:
        raise ScanError(f"u has shape {_shape(u)}, expected three axes {axes}")
    batch = u.shape[0]
    width, length = (u.shape[1], u.shape[2]) if layout == "bdl" else (u.shape[2], u.shape[1])
    if length < 1 or width < 1:
        raise ScanError(f"u has shape {_shape(u)} as {axes}, needs at least one step and channel")
    if A.dim() != 2 or A.shape[0] != width or A.shape[1] < 1:
        raise ScanError(
            f"A has shape {_shape(A)}, expected (D, N) with D = {width} "
            f"from u of shape {_shape(u)} as {axes}"
        )
    states = A.shape[1]
    for name, want in (
        ("delta", tuple(u.shape)),
        ("z", tuple(u.shape)),
        ("D", (width,)),
        ("delta_bias", (width,)),
        ("initial_state", (batch, width, states)),
    ):
        t = tensors[name]
        if t is not None and tuple(t.shape) != want:
            raise ScanError(
                f"{name} has shape {_shape(t)}, expected {want} from u of shape {_shape(u)} "
                f"as {axes} and A of shape {_shape(A)}"
            )
    for name in ("B", "C"):
        m = tensors[name]
        assert m is not None
        _check_matrix(name, m, batch, width, length, states, layout)


def _check_matrix(
    name: str, m: Tensor, batch: int, width: int, length: int, states: int, layout: str
) -> None:
    if layout == "bdl":
        want = {2: (width, states), 3: (batch, states, length)}
        grouped = f"({batch}, G, {states}, {length})"
        rest = (m.shape[0], *m.shape[2:])
        fits = m.dim() == 4 and rest == (batch, states, length)
        groups = m.shape[1] if m.dim() == 4 else 1
    else:
        want = {2: (width, states), 3: (batch, length, states)}
        grouped = f"({batch}, {length}, G, {states})"
        fits = m.dim() == 4 and (*m.shape[:2], m.shape[3]) == (batch, length, states)
        groups = m.shape[2] if m.dim() == 4 else 1
    if m.dim() in want:
        fits = tuple(m.shape) == want[m.dim()]
    if not fits:
        raise ScanError(
            f"{name} has shape {_shape(m)}, expected {want[2]}, {want[3]} or {grouped} "
            f"in layout {layout!r}"
        )
    if groups < 1 or width % groups:
        raise ScanError(
            f"{name} has shape {_shape(m)} with {groups} groups, which must divide "
            f"the {width} channels of u"
        )
