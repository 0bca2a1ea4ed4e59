"""Bad input: each message names the argument, what was given and what is needed."""

from __future__ import annotations

import importlib
import types

import pytest
import torch

import mfuser_kernels
from mfuser_kernels import ScanError, selective_scan
from mfuser_kernels.scan import backends
from mfuser_kernels.testing import scan_inputs


def call(**changes):
    inputs = scan_inputs(2, 10, 8, 3, start=True)
    return selective_scan(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": torch.ones(2, 9, 8)}, ["delta", "(2, 9, 8)", "(2, 10, 8)"]),
        ({"z": torch.ones(2, 8, 10)}, ["z", "(2, 8, 10)", "(2, 10, 8)"]),
        ({"A": torch.ones(7, 3)}, ["A", "(7, 3)", "D = 8", "(2, 10, 8)"]),
        ({"B": torch.ones(2, 3, 10)}, ["B", "(2, 3, 10)", "(2, 10, 3)", "'bld'"]),
        ({"C": torch.ones(2, 10, 3, 3)}, ["C", "(2, 10, 3, 3)", "3 groups", "8 channels"]),
        ({"D": torch.ones(9)}, ["D", "(9,)", "(8,)"]),
        ({"delta_bias": torch.ones(8, 1)}, ["delta_bias", "(8, 1)", "(8,)"]),
        ({"initial_state": torch.ones(2, 3, 8)}, ["initial_state", "(2, 3, 8)", "(2, 8, 3)"]),
        ({"u": torch.ones(10, 8)}, ["u", "(10, 8)", "(B, L, D)"]),
        ({"u": torch.ones(2, 0, 8)}, ["u", "(2, 0, 8)", "at least one"]),
        ({"A": torch.ones(8, 3, dtype=torch.complex64)}, ["A", "complex", "real"]),
        ({"u": torch.ones(2, 10, 8, dtype=torch.int64)}, ["u", "torch.int64", "float32"]),
        ({"B": torch.ones(2, 10, 3, device="meta")}, ["B", "meta", "cpu", "one device"]),
        ({"D": 1.0}, ["D", "tensor", "float"]),
        ({"layout": "dbl"}, ["'dbl'", "'bdl'", "'bld'"]),
        ({"backend": "chunkd"}, ["'chunkd'", "'chunked'", "reference", "cpu", "triton"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_message(changes, words):
    with pytest.raises(ScanError) as caught:
        call(**changes)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, so these can be used")
@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_unusable_backend_says_why(backend):
    with pytest.raises(ScanError, match=f"backend '{backend}' cannot run this scan: .+"):
        call(backend=backend)


def test_cpu_backend_refuses_float64_and_auto_takes_another():
    inputs = scan_inputs(2, 10, 8, 3)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with pytest.raises(ScanError, match="float64"):
        selective_scan(**double, backend="cpu")
    assert selective_scan(**double).dtype == torch.float64


def test_missing_compiler_names_the_extra(monkeypatch):
    find = backends.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "llvmlite" else find(name)
    )
    found = {b.name: b for b in mfuser_kernels.backends()}
    assert not found["cpu"].usable and 'pip install "mfuser[cpu]"' in found["cpu"].reason
    assert backends.choose("auto", "cpu", torch.float32, False) == "chunked"
    with pytest.raises(ScanError, match=r"mfuser\[cpu\]"):
        call(backend="cpu")


def test_the_mamba_extra_says_how_its_kernel_is_built(monkeypatch):
    """mamba-ssm leaves Mamba-1's kernel out unless told, and then imports all the same."""
    from mfuser_kernels.scan import mamba

    reasons = [mamba.unusable.__wrapped__()]
    find, load = backends.importlib.util.find_spec, importlib.import_module
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "mamba_ssm" or find(name))
    monkeypatch.setattr(
        "importlib.import_module",
        lambda name: (
            types.SimpleNamespace(selective_scan_cuda=None) if name == mamba.MODULE else load(name)
        ),
    )
    reasons.append(mamba.unusable.__wrapped__())
    assert "not installed" in reasons[0] and "without Mamba-1's CUDA kernel" in reasons[1]
    assert all("MAMBA_KEEP_CUDA_BUILD=TRUE pip install" in reason for reason in reasons)


def test_backends_are_listed_with_reasons():
    found = {b.name: b for b in mfuser_kernels.backends()}
    assert set(found) == {"triton", "mamba_ssm", "cpu", "chunked", "associative", "reference"}
    assert found["reference"].usable and found["chunked"].usable
    assert all(b.usable != bool(b.reason) for b in found.values())


def test_environment_takes_the_place_of_auto(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "chunked")
    assert backends.choose("auto", "cpu", torch.float32, False) == "chunked"
    assert backends.choose("reference", "cpu", torch.float32, False) == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "nonsense")
    with pytest.raises(ScanError, match="MFUSER_SCAN_BACKEND.*'nonsense'"):
        backends.choose("auto", "cpu", torch.float32, False)
