"""The code that the CPU backend generates; its values are tested in test_scan_values."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("llvmlite", reason='llvmlite is not installed: pip install "mfuser[cpu]"')

from mfuser_kernels import selective_scan
from mfuser_kernels.scan.cpu import compiler, vector
from mfuser_kernels.scan.cpu.kernels import Variant
from mfuser_kernels.testing import (
    errors,
    inverse_softplus,
    relative_rms,
    run_scan,
    scan_inputs,
)


@pytest.mark.parametrize("has_lookup", [False, True])
@pytest.mark.parametrize("length", [257, 20000])
def test_both_exponentials(length, has_lookup, long_scan, monkeypatch, tmp_path):
    """By a table on AVX-512, else by a longer polynomial: compiled here for either."""
    if has_lookup and not vector.has_lookup():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(vector, "has_lookup", lambda: has_lookup)
    monkeypatch.setattr(compiler, "_functions", {})
    monkeypatch.setenv("MFUSER_CACHE_DIR", str(tmp_path))
    inputs, exact = long_scan if length == 20000 else (scan_inputs(1, length, 48, 16), None)
    found = errors(inputs, "cpu", exact=exact)
    assert all(error < 1e-5 for error in found.values()), found


@pytest.mark.parametrize("direction", compiler.BUILDERS)
def test_every_function_aligns_its_stack(direction):
    """Else its spilled vectors lie in two cache lines each, or not, by chance of the caller."""
    code = compiler.BUILDERS[direction](Variant(16, False, True, True, False, False, False), "f")
    heads = [line for line in code.splitlines() if line.startswith("define")]
    assert len(heads) == 2  # the task and its driver
    assert all("stackrealign" in head for head in heads), heads


@pytest.mark.parametrize("low", [-8.0, -2.0, 2.0])
def test_softplus_is_as_good_as_float32(low):
    """With a state that forgets at once, and ones for all else, the output is the step itself."""
    delta = torch.linspace(low, low + 4, 4000).view(1, -1, 1)
    ones, forget = torch.ones_like(delta), torch.full((1, 1), -1e5)
    y = selective_scan(
        ones, delta, forget, ones, ones, delta_softplus=True, layout="bld", backend="cpu"
    )
    assert relative_rms(y, torch.nn.functional.softplus(delta.double())) < 1e-7


def test_sums_over_time_lose_little(long_scan):
    """Of terms of both signs, over so many steps that one float32 sum is off by 4e-6."""
    inputs, exact = long_scan
    found = errors(inputs, "cpu", exact=exact)
    assert max(found[f"grad {name}"] for name in ("A", "D", "delta_bias")) < 1.5e-6, found


@pytest.mark.parametrize(
    ("size", "spread", "softplus"),
    [(1e-8, 0, False), (1e-8, 1, True), (1e-6, 0, True), (1e-3, 0, True)],
)
def test_decays_close_to_one_are_right_on_average(size, spread, softplus):
    """Rounded each by itself, they made these errors 9e-6 to 9e-5."""
    inputs = scan_inputs(1, 6000, 8, 3, softplus=softplus, bias=False, gate=False)
    step = size * torch.exp(spread * inputs["delta"])
    inputs["delta"] = inverse_softplus(step) if softplus else step
    found = errors(inputs, "cpu", exact=run_scan(inputs, "chunked", torch.float64))
    assert all(error < 5e-6 for error in found.values()), found


def test_a_step_of_zero_leaves_the_state_as_it_is():
    inputs = scan_inputs(1, 2000, 16, 5, softplus=False, bias=False, start=True)
    inputs["delta"].zero_()
    _, last = selective_scan(**inputs, return_last_state=True, backend="cpu")
    assert torch.equal(last, inputs["initial_state"])
