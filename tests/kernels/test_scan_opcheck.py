"""torch's own checks of the operators: schemas, aliasing, fake tensors against real, tracing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mfuser_kernels import selective_scan
from mfuser_kernels.scan import op
from mfuser_kernels.testing import GRADIENTS, scan_inputs

# (batch, length, width, states), options, what else is special about the tensors
CASES = [
    ((2, 40, 16, 16), {"start": True}, ""),
    ((2, 33, 24, 8), {}, ""),  # channels that do not fill a vector
    ((2, 33, 16, 5), {}, ""),  # states that do not fill a group
    ((2, 70, 7, 3), {"start": True}, ""),
    ((1, 1, 7, 5), {"start": True}, ""),
    ((2, 1, 1, 1), {}, ""),
    ((0, 9, 7, 3), {"start": True}, ""),
    ((0, 9, 24, 3), {"groups": 2, "gate": False}, ""),
    ((2, 20, 18, 5), {"groups": 3}, ""),
    ((2, 20, 24, 3), {"constant": "B"}, ""),
    ((2, 20, 24, 3), {"constant": "C", "groups": 2}, ""),
    ((2, 20, 7, 17), {"constant": "BC", "start": True}, ""),
    ((2, 20, 7, 3), {"skip": False, "gate": False, "bias": False, "softplus": False}, ""),
    ((2, 20, 7, 3), {"skip": False, "bias": False}, ""),
    ((2, 20, 7, 3), {"dtype": torch.bfloat16}, ""),
    ((2, 20, 16, 3), {"dtype": torch.float16, "start": True}, ""),
    ((2, 20, 7, 3), {}, "mixed"),
    ((2, 20, 16, 3), {"start": True}, "transposed"),
    ((2, 20, 7, 3), {"start": True}, "transposed"),
]
TRIAL = ("test_schema", "test_faketensor")


def transposed(t):
    """The same values, the last two axes the other way round in memory, as of layout "bdl"."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def operands(shape, options, special):
    """The nine tensors, None where absent, and delta_softplus."""
    x = scan_inputs(*shape, **options)
    for name in "BC":
        if x[name].dim() == 3:
            x[name] = x[name].unsqueeze(2)
    if special == "mixed":
        x["u"], x["B"] = x["u"].bfloat16(), x["B"].half()
    if special == "transposed":
        x = {k: transposed(t) if isinstance(t, torch.Tensor) else t for k, t in x.items()}
    return [x.get(name) for name in GRADIENTS], x["delta_softplus"]


def check_all(shape, options, special, backend, trace):
    """The operator with its derivatives, then the two that it is made of."""
    tensors, softplus = operands(shape, options, special)
    rest = (softplus, True, backend)
    for run in (op.selective_scan, op.selective_scan_forward):
        torch.library.opcheck(run, (*tensors, *rest), test_utils=TRIAL)
    out, last, saved = op.selective_scan_forward(*tensors, *rest)
    for cotangents in ((out, last), (None, last), (transposed(out), None)):
        arguments = (*tensors, *cotangents, saved, softplus, backend)
        torch.library.opcheck(op.selective_scan_backward, arguments, test_utils=TRIAL)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    tests = ("test_autograd_registration", *(["test_aot_dispatch_dynamic"] if trace else []))
    torch.library.opcheck(op.selective_scan, (*leaves, *rest), test_utils=tests)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize(("shape", "options", "special"), CASES, ids=str)
def test_operators_keep_their_promises(shape, options, special, backend):
    check_all(shape, options, special, backend, trace=shape[0] > 0)


# The interpreter is chosen when a kernel is defined, so these run in a process of their own.
INTERPRETED = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_scan_derivatives import Problem, double_backward, jvp, relative_rms, vmap_of_grad
from test_scan_opcheck import check_all
check_all((1, 3, 3, 3), dict(start=True), "", "triton", False)
check_all((0, 3, 3, 3), dict(start=True), "", "triton", False)
check_all((1, 2, 4, 1), dict(groups=2, constant="C", gate=False), "transposed", "triton", False)
p = Problem((1, 2, 3, 2), dict(start=True))
for kind in (jvp, double_backward, vmap_of_grad):
    assert max(map(relative_rms, kind(p, "triton"), kind(p, "reference"))) < 2e-5, kind
print("checked")
"""


def test_operators_with_interpreted_triton_kernels():
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    found = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.stdout.strip() == "checked", found.stderr


def test_compiled_gradients_where_tensors_are_padded():
    """Inductor's code asserts the strides that the fake gradients promise."""
    inputs = scan_inputs(2, 33, 24, 5)
    names = [name for name in GRADIENTS if name in inputs]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def loss(*given):
        named = dict(zip(names, given, strict=True))
        return selective_scan(**named, **rest, backend="cpu").square().sum()

    leaves = [inputs[name].requires_grad_() for name in names]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)
