"""The scan as a torch operator: tracing, autograd, autocast, checkpoints, counted operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mfuser_kernels import selective_scan
from mfuser_kernels.scan import op
from mfuser_kernels.testing import relative_rms, run_scan, scan_inputs

BACKENDS = ["cpu", "chunked"]


def leaves(inputs):
    return {
        k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }


def test_gradcheck_of_the_reference():
    inputs = scan_inputs(1, 6, 2, 2, start=True)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]
    tensors = [inputs[k].double().requires_grad_() for k in names]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def scan(*given):
        named = dict(zip(names, given, strict=True))
        return selective_scan(**named, **rest, return_last_state=True, backend="reference")

    assert torch.autograd.gradcheck(scan, tensors)


def test_gradcheck_of_the_chunked_backend():
    inputs = scan_inputs(1, 40, 2, 2, start=True, groups=1)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]
    tensors = [inputs[k].double().requires_grad_() for k in names]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def scan(*given):
        named = dict(zip(names, given, strict=True))
        return selective_scan(**named, **rest, return_last_state=True, backend="chunked")

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS])
def test_compile_without_a_graph_break(backend):
    length = 6 if backend == "reference" else 40  # its loop over the steps is unrolled
    inputs = scan_inputs(2, length, 8, 3, gate=False)

    def f(u, rest):
        return selective_scan(u * 2, **rest, backend=backend).sin().sum()

    rest = {k: v for k, v in inputs.items() if k != "u"}
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (f, compiled):
        u = inputs["u"].clone().requires_grad_()
        given = leaves(rest)
        function(u, given).backward()
        grads.append((u.grad, given["A"].grad, given["delta_bias"].grad))
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    """A layer's bfloat16 activations meet float32 parameters; the state stays float32."""
    inputs = scan_inputs(2, 40, 8, 3, gate=False)
    layer = torch.nn.Linear(8, 8)
    given = leaves({k: v for k, v in inputs.items() if k != "u"})
    with torch.autocast("cpu", torch.bfloat16):
        u = layer(inputs["u"])
        out, last = selective_scan(u, **given, return_last_state=True, backend=backend)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    out.float().sum().backward()
    assert layer.weight.grad.dtype == given["A"].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, reentrant):
    inputs = scan_inputs(2, 70, 8, 3, gate=False)
    grads = []
    for saving in (False, True):
        given = leaves(inputs)
        rest = {k: v for k, v in given.items() if k != "u"}

        def f(u, rest=rest):
            return selective_scan(u, **rest, backend=backend)

        u = given["u"]
        out = checkpoint(f, u, use_reentrant=reentrant) if saving else f(u)
        out.square().sum().backward()
        grads.append((u.grad, given["A"].grad))
    for plain, saved in zip(*grads, strict=True):
        assert torch.equal(plain, saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_counted(backend):
    inputs = leaves(scan_inputs(2, 40, 8, 3))
    with FlopCounterMode(display=False) as counter:
        out = selective_scan(**inputs, backend=backend)
    forward = op.scan_flops(2, 40, 8, 3, skip=True, gate=True)
    assert counter.get_total_flops() == forward == 2 * 40 * 8 * (7 * 3 + 2 + 2 + 2)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_meta_tensors_give_shapes():
    inputs = scan_inputs(2, 40, 8, 3)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    out, last = selective_scan(**meta, return_last_state=True)
    assert out.shape == (2, 40, 8) and last.shape == (2, 8, 3) and out.device.type == "meta"


@pytest.mark.parametrize("backend", ["auto", "reference", "associative", *BACKENDS])
def test_an_empty_batch_is_empty_everywhere(backend):
    """No step, so no last state and gradients of zero; with every layout and option."""
    for options in ({"start": True}, {"groups": 2, "gate": False}, {"constant": "BC"}):
        inputs = scan_inputs(0, 40, 24, 5, **options)
        found = run_scan(inputs, backend)
        assert found["out"].shape == (0, 40, 24) and found["last_state"].shape == (0, 24, 5)
        for name, t in inputs.items():
            if isinstance(t, torch.Tensor):
                assert torch.equal(found[f"grad {name}"], torch.zeros_like(t)), name
    empty = torch.rand(0, 24, 40), torch.rand(0, 24, 40), -torch.rand(24, 5)
    assert selective_scan(*empty, *torch.rand(2, 0, 5, 40), backend=backend).shape == (0, 24, 40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_without_gradients(backend):
    inputs = scan_inputs(2, 40, 8, 3)
    with torch.no_grad():
        out = selective_scan(**leaves(inputs), backend=backend)
    assert out.grad_fn is None
    assert torch.equal(out, selective_scan(**leaves(inputs), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_deterministic(backend):
    inputs = scan_inputs(2, 200, 130, 5)
    once, again = (run_scan(inputs, backend) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_every_element_of_the_output_is_written(monkeypatch):
    """Memory that torch.empty hands out is poisoned; nothing of it may be left."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    inputs = scan_inputs(2, 150, 40, 17, groups=2)
    expected = {backend: run_scan(inputs, backend) for backend in BACKENDS}
    monkeypatch.setattr(torch, "empty", poisoned)
    for backend in BACKENDS:
        for name, value in run_scan(inputs, backend).items():
            assert relative_rms(value, expected[backend][name]) == 0, (backend, name)
