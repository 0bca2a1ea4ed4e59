"""torch's own checks of the operators: schemas, aliasing, fake tensors against real, tracing."""

from __future__ import annotations

import pytest
import torch

from mfuser_kernels import selective_scan
from mfuser_kernels.scan import op
from mfuser_kernels.testing import GRADIENTS, scan_inputs

# (batch, length, width, states), options, what else is special about the tensors; "traced" ones
# are also traced with dynamic shapes, which takes the longest.
CASES = [
    ((2, 40, 16, 16), {"start": True}, "traced"),
    ((2, 33, 24, 8), {}, ""),  # channels that do not fill a vector
    ((2, 33, 16, 5), {}, ""),  # states that do not fill a group
    ((2, 70, 7, 3), {"start": True}, ""),
    ((1, 1, 7, 5), {"start": True}, "traced"),
    ((2, 1, 1, 1), {}, ""),
    ((0, 9, 7, 3), {"start": True}, ""),
    ((0, 9, 24, 3), {"groups": 2, "gate": False}, ""),
    ((2, 20, 18, 5), {"groups": 3}, "traced"),
    ((2, 20, 24, 3), {"constant": "B"}, ""),
    ((2, 20, 24, 3), {"constant": "C", "groups": 2}, "traced"),
    ((2, 20, 7, 17), {"constant": "BC", "start": True}, ""),
    ((2, 20, 7, 3), {"skip": False, "gate": False, "bias": False, "softplus": False}, "traced"),
    ((2, 20, 7, 3), {"skip": False, "bias": False}, ""),
    ((2, 20, 7, 3), {"dtype": torch.bfloat16}, ""),
    ((2, 20, 16, 3), {"dtype": torch.float16, "start": True}, ""),
    ((2, 20, 7, 3), {}, "mixed traced"),
    ((2, 20, 16, 3), {"start": True}, "transposed traced"),
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
    if "mixed" in special:
        x["u"], x["B"] = x["u"].bfloat16(), x["B"].half()
    if "transposed" in special:
        x = {k: transposed(t) if isinstance(t, torch.Tensor) else t for k, t in x.items()}
    return [x.get(name) for name in GRADIENTS], x["delta_softplus"]


def check_all(shape, options, special, backend):
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
    tests = ("test_autograd_registration", *["test_aot_dispatch_dynamic"] * ("traced" in special))
    torch.library.opcheck(op.selective_scan, (*leaves, *rest), test_utils=tests)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize(("shape", "options", "special"), CASES, ids=str)
def test_operators_keep_their_promises(shape, options, special, backend):
    check_all(shape, options, special, backend)


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
