"""Every kind of derivative, and vmap, on every backend, against the reference in float64."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import func
from torch.autograd import forward_ad, functional

from mfuser_kernels import selective_scan
from mfuser_kernels.scan import mamba, op
from mfuser_kernels.scan.inputs import ScanInputs
from mfuser_kernels.testing import GRADIENTS, relative_rms, scan_inputs

BACKENDS = ["reference", "associative", "chunked", "cpu"]
CASES = [
    ((2, 7, 4, 3), {"start": True}),
    ((1, 1, 3, 2), {"skip": False, "gate": False, "bias": False, "softplus": False}),
    ((1, 34, 4, 2), {"groups": 2, "constant": "C"}),
    ((2, 5, 4, 3), {"constant": "B", "gate": False}),
]


class Problem:
    """A scan of named tensors as a function of one of them, or of a tuple of all."""

    def __init__(self, shape, options, dtype=torch.float32):
        inputs = scan_inputs(*shape, **options)
        self.names = [name for name in GRADIENTS if name in inputs]
        self.tensors = tuple(inputs.pop(name).to(dtype) for name in self.names)
        self.rest = inputs
        random = torch.Generator().manual_seed(3)
        self.tangents = tuple(
            torch.randn(t.shape, generator=random).to(dtype) for t in self.tensors
        )

    def scan(self, backend):
        def of_all(*tensors):
            named = dict(zip(self.names, tensors, strict=True))
            return selective_scan(**named, **self.rest, return_last_state=True, backend=backend)

        return of_all

    def loss(self, backend):
        """A number that depends on both outputs, with second derivatives of every kind."""

        def of_all(*tensors):
            out, last = self.scan(backend)(*tensors)
            return out.square().sum() + (out.sum() * last.square()).mean()

        return of_all


def every(problem):
    return tuple(range(len(problem.tensors)))


def tangent(dual):
    """Zeros for one that autograd knows to have none."""
    primal, found = forward_ad.unpack_dual(dual)
    return torch.zeros_like(primal) if found is None else found


def with_gradients(tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


def jvp(p, backend):
    return func.jvp(p.scan(backend), p.tensors, p.tangents)[1]


def jvp_of_one(p, backend):
    def of_delta(delta):
        return p.scan(backend)(p.tensors[0], delta, *p.tensors[2:])

    return func.jvp(of_delta, p.tensors[1:2], p.tangents[1:2])[1]


def dual_numbers(p, backend):
    with torch.no_grad(), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, p.tensors, p.tangents)
        return list(map(tangent, p.scan(backend)(*duals)))


def dual_gradients(p, backend):
    """The tangent of a gradient, where only what comes in from above has one."""
    leaves = with_gradients(p.tensors)
    out, _ = p.scan(backend)(*leaves)
    with forward_ad.dual_level():
        above = forward_ad.make_dual(out.detach(), out.detach().cos())
        grads = torch.autograd.grad(out, leaves, above)
        return list(map(tangent, grads))


def grad(p, backend):
    return func.grad(p.loss(backend), argnums=every(p))(*p.tensors)


def vjp(p, backend):
    outputs, pull = func.vjp(p.scan(backend), *p.tensors)
    return pull(tuple(t.sin() for t in outputs))


def vjp_of_the_last_state(p, backend):
    last, pull = func.vjp(lambda *t: p.scan(backend)(*t)[1], *p.tensors)
    return pull(last.sin())


def jacrev(p, backend):
    return func.jacrev(lambda *t: p.scan(backend)(*t)[0].sum(1), argnums=every(p))(*p.tensors)


def jacfwd(p, backend):
    return func.jacfwd(lambda *t: p.scan(backend)(*t)[1].sum(1), argnums=(0, 1, 2))(*p.tensors)


def hessian(p, backend):
    rows = func.hessian(p.loss(backend), argnums=(0, 2, 3))(*p.tensors)
    return [block for row in rows for block in row]


def reverse_over_reverse(p, backend):
    rows = func.jacrev(func.grad(p.loss(backend), argnums=(1, 2)), argnums=(1, 4))(*p.tensors)
    return [block for row in rows for block in row]


def double_backward(p, backend):
    leaves = with_gradients(p.tensors)
    grads = torch.autograd.grad(p.loss(backend)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def triple_backward(p, backend):
    leaves = with_gradients(p.tensors)
    grads = torch.autograd.grad(p.loss(backend)(*leaves), leaves, create_graph=True)
    total = sum(g.square().sum() for g in grads)
    seconds = torch.autograd.grad(total, leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in seconds), leaves)


def old_hessian(p, backend):
    def of_two(A, weights):
        return p.loss(backend)(*p.tensors[:2], A, *p.tensors[3:-1], weights)

    rows = functional.hessian(of_two, (p.tensors[2], p.tensors[-1]))
    return [block for row in rows for block in row]


def batched_gradients(p, backend):
    """With the older vmap, which knows no rules for operators."""
    leaves = with_gradients(p.tensors)
    out, _ = p.scan(backend)(*leaves)
    above = torch.stack([out.detach(), out.detach().cos()])
    return torch.autograd.grad(out, leaves, above, is_grads_batched=True)


def mapped(p):
    """Three scans, all of whose tensors differ, along another axis in each tensor."""
    axes = tuple(i % (t.dim() + 1) for i, t in enumerate(p.tensors))
    stacks = [
        torch.stack([t, t + 0.1 * d, t - 0.1 * d], axis)
        for t, d, axis in zip(p.tensors, p.tangents, axes, strict=True)
    ]
    return axes, stacks


def vmap_of_all(p, backend):
    axes, stacks = mapped(p)
    return torch.vmap(p.scan(backend), axes)(*stacks)


def vmap_of_each(p, backend):
    axes, stacks = mapped(p)
    found = []
    for i in every(p):
        one = [axis if i == j else None for j, axis in enumerate(axes)]
        given = [stacks[j] if i == j else t for j, t in enumerate(p.tensors)]
        found += torch.vmap(p.scan(backend), tuple(one))(*given)
    return found


def vmap_of_grad(p, backend):
    axes, stacks = mapped(p)
    return torch.vmap(func.grad(p.loss(backend), argnums=every(p)), axes)(*stacks)


def grad_of_vmap(p, backend):
    axes, stacks = mapped(p)
    return func.grad(
        lambda *t: torch.vmap(p.loss(backend), axes)(*t).square().sum(), argnums=every(p)
    )(*stacks)


def backward_of_vmap(p, backend):
    axes, stacks = mapped(p)
    leaves = with_gradients(stacks)
    return torch.autograd.grad(torch.vmap(p.loss(backend), axes)(*leaves).square().sum(), leaves)


def vmap_of_vmap(p, backend):
    def of_u_and_a(u, a):
        return p.scan(backend)(u, p.tensors[1], a, *p.tensors[3:])

    u, a = (torch.stack([t, 2 * t]) for t in (p.tensors[0], p.tensors[2]))
    return torch.vmap(torch.vmap(of_u_and_a, (None, 0)), (0, None))(u, a)


def vmap_of_jvp(p, backend):
    axes, stacks = mapped(p)
    return torch.vmap(lambda *t: func.jvp(p.scan(backend), t, p.tangents)[1], axes)(*stacks)


def jvp_of_vmap(p, backend):
    axes, stacks = mapped(p)
    return func.jvp(
        torch.vmap(p.scan(backend), axes), tuple(stacks), tuple(map(torch.cos, stacks))
    )[1]


KINDS = [
    jvp, jvp_of_one, dual_numbers, dual_gradients, grad, vjp, vjp_of_the_last_state, jacrev, jacfwd,
    hessian, reverse_over_reverse, double_backward, triple_backward, old_hessian, batched_gradients,
    vmap_of_all, vmap_of_each, vmap_of_grad, grad_of_vmap, backward_of_vmap, vmap_of_vmap,
    vmap_of_jvp, jvp_of_vmap,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_derivatives(kind, shape, options):
    exact = kind(Problem(shape, options, torch.float64), "reference")
    assert any(t.abs().sum() > 0 for t in exact)
    for backend in BACKENDS:
        found = kind(Problem(shape, options), backend)
        assert len(found) == len(exact)
        worst = max(map(relative_rms, found, exact))
        assert worst < 2e-5, (backend, worst)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_in_half_precision(backend):
    """Gradients keep the dtypes of their tensors; the errors are those of bfloat16."""
    p = Problem((2, 20, 4, 3), {"start": True})
    p.tensors = tuple(t.bfloat16() if t.dim() == 3 else t for t in p.tensors)
    double = Problem((2, 20, 4, 3), {"start": True}, torch.float64)
    double.tensors = tuple(t.double() for t in p.tensors)
    p.tangents = tuple(d.to(t.dtype) for d, t in zip(p.tangents, p.tensors, strict=True))
    double.tangents = tuple(d.double() for d in p.tangents)
    for kind in (jvp, grad, double_backward, vmap_of_all):
        found, exact = kind(p, backend), kind(double, "reference")
        assert max(map(relative_rms, found, exact)) < 3e-2, kind
    assert [t.dtype for t in grad(p, backend)] == [t.dtype for t in p.tensors]


def test_the_plain_operator_refuses_transforms():
    """Compiled and exported graphs call it; there, forward mode would have been zero."""
    p = Problem((1, 5, 4, 3), {"start": True, "groups": 1})

    def run(*tensors):
        return op.selective_scan(*tensors, True, False, "chunked")[0]

    assert torch.equal(run(*p.tensors), p.scan("chunked")(*p.tensors)[0])
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, p.tensors, p.tangents)
        of_op = forward_ad.unpack_dual(run(*duals)).tangent
    torch.testing.assert_close(of_op, jvp(p, "reference")[0])
    for transform in (
        lambda: func.jvp(run, p.tensors, p.tangents),
        lambda: func.grad(lambda *t: run(*t).sum())(*p.tensors),
    ):
        with pytest.raises(NotImplementedError, match="call mfuser_kernels.selective_scan"):
            transform()


def test_compiled_code_leaves_transforms_to_torch():
    p = Problem((1, 5, 4, 3), {"start": True})

    def tangents():
        return func.jvp(p.scan("cpu"), p.tensors, p.tangents)[1]

    torch._dynamo.reset()
    for a, b in zip(torch.compile(tangents, backend="eager")(), jvp(p, "cpu"), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="and not inside torch.compile"):
        torch.compile(tangents, backend="eager", fullgraph=True)()


class Kernel(torch.autograd.Function):
    """As mamba-ssm's own: its backward returns what autograd takes for constants."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, softplus):
        ctx.softplus = softplus
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias)
        return selective_scan(
            u, delta, A, B, C, D, z, bias, softplus, return_last_state=True, backend="reference"
        )

    @staticmethod
    def backward(ctx, d_out, d_last):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            outputs = Kernel.forward(Nothing(), *leaves, ctx.softplus)
        given = (d_out.detach(), d_last.detach())
        return (*torch.autograd.grad(outputs, leaves, given), None)


class Nothing:
    def save_for_backward(self, *_):
        pass


@pytest.fixture
def mamba_kernel(monkeypatch):
    """A stand-in for the module of mamba-ssm, which asks for one dtype as its kernel does."""
    seen = []

    def selective_scan_fn(u, delta, A, B, C, D, z, bias, softplus, last):
        seen.append({t.dtype for t in (u, delta, z, B, C) if t is not None and t.dim() > 2})
        return Kernel.apply(u, delta, A, B, C, D, z, bias, softplus)

    module = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, mamba.MODULE, module)
    return seen


def test_mamba_ssm_refuses_what_its_kernel_would_get_wrong(mamba_kernel):
    p = Problem((2, 7, 4, 3), {"groups": 1})

    def scan(*tensors):
        return mamba.scan(ScanInputs(*tensors, None, True))

    leaves = with_gradients(p.tensors)
    out, _ = scan(*leaves)
    grads = torch.autograd.grad(out.sum() + leaves[0].square().sum(), leaves, create_graph=True)
    torch.testing.assert_close(
        grads[1], torch.autograd.grad(p.scan("reference")(*leaves)[0].sum(), leaves)[1]
    )
    refused = pytest.raises(NotImplementedError, match="'mamba_ssm' has first derivatives in rev")
    with refused:  # without a guard 2: the derivative of the square alone
        torch.autograd.grad(grads[0].sum(), leaves)
    with refused, forward_ad.dual_level():
        scan(*map(forward_ad.make_dual, p.tensors, p.tangents))
    for transform in (
        lambda: func.jvp(scan, p.tensors, p.tangents),
        lambda: func.grad(lambda *t: scan(*t)[0].sum())(*p.tensors),
        lambda: torch.vmap(scan)(*(t[None] for t in p.tensors)),
    ):
        with refused:
            transform()


def test_mamba_ssm_gets_every_input_in_the_widest_precision(mamba_kernel):
    inputs = scan_inputs(2, 300, 4, 3, groups=1)
    inputs["u"], inputs["B"] = inputs["u"].bfloat16(), inputs["B"].half()
    given = [inputs.get(name) for name in GRADIENTS]
    out, _ = mamba.scan(ScanInputs(*given, True))
    assert mamba_kernel == [{torch.float32}] and out.dtype == torch.bfloat16
    assert torch.equal(out, selective_scan(**inputs, backend="reference"))
    empty = [t[:0] if t is not None and t.dim() > 2 else t for t in given]
    out, last = mamba.scan(ScanInputs(*empty, True))
    assert out.shape == (0, 300, 4) and last.shape == (0, 4, 3) and len(mamba_kernel) == 1
