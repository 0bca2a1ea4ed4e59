"""The Triton backend: in Triton's interpreter without a GPU, compiled with one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from mfuser_kernels import selective_scan
from mfuser_kernels.testing import errors, run_scan, scan_inputs

# The interpreter is chosen when a kernel is defined, so all runs in a process of its own: values,
# torch's checks of the operators, derivatives.
INTERPRETED = f"""
import sys
import torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from mfuser_kernels.testing import errors, scan_inputs
from test_scan_derivatives import Problem, double_backward, jvp, relative_rms, vmap_of_grad
from test_scan_opcheck import check_all
torch.set_num_threads(1)
for shape, options in (
    ((1, 17, 2, 3), dict(start=True)),
    ((2, 1, 1, 1), dict(gate=False, skip=False, bias=False, softplus=False)),
    ((1, 3, 2, 2), dict(groups=2, dtype=torch.bfloat16)),
    ((1, 5, 2, 1), dict(constant="BC")),
    ((1, 50, 2, 2), dict(gate=False)),
):
    found = errors(scan_inputs(*shape, **options), "triton")
    tolerance = 1e-2 if options.get("dtype") else 1e-5
    assert all(error < tolerance for error in found.values()), (shape, options, found)
check_all((1, 3, 3, 3), dict(start=True), "", "triton")
check_all((0, 3, 3, 3), dict(start=True), "", "triton")
check_all((1, 2, 4, 1), dict(groups=2, constant="C", gate=False), "transposed", "triton")
p = Problem((1, 2, 3, 2), dict(start=True))
for kind in (jvp, double_backward, vmap_of_grad):
    assert max(map(relative_rms, kind(p, "triton"), kind(p, "reference"))) < 2e-5, kind
print("checked")
"""


def test_interpreted_kernels_and_their_operators():
    found = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.stdout.strip() == "checked", found.stderr


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 7, 3), (1, 31, 48, 16), (2, 65, 500, 8), (1, 257, 16, 64), (2, 2594, 512, 16)],
    ids=str,
)
@pytest.mark.parametrize("gate", [False, True])
class TestOnGpu:
    pytestmark = gpu

    def test_values(self, shape, gate):
        found = errors(scan_inputs(*shape, gate=gate, start=True, device="cuda"), "triton")
        assert all(error < 1e-5 for error in found.values()), found

    def test_half_precision(self, shape, gate):
        inputs = scan_inputs(*shape, gate=gate, dtype=torch.bfloat16, device="cuda")
        found = errors(inputs, "triton")
        assert all(error < 1e-2 for error in found.values()), found

    def test_deterministic(self, shape, gate):
        inputs = scan_inputs(*shape, gate=gate, device="cuda")
        once, again = (run_scan(inputs, "triton") for _ in range(2))
        assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4},
        {"constant": "B"},
        {"constant": "BC", "start": True},
        {"skip": False, "gate": False, "bias": False, "softplus": False},
    ],
    ids=str,
)
class TestOptionsOnGpu:
    pytestmark = gpu

    def test_values(self, options):
        found = errors(scan_inputs(2, 150, 24, 5, device="cuda", **options), "triton")
        assert all(error < 1e-5 for error in found.values()), found


class TestChoiceOnGpu:
    pytestmark = gpu

    def test_auto_takes_triton(self):
        inputs = scan_inputs(2, 150, 24, 5, device="cuda")
        expected = selective_scan(**inputs, backend="triton")
        assert torch.equal(selective_scan(**inputs), expected)

    def test_mixed_devices_are_refused(self):
        inputs = scan_inputs(2, 15, 8, 5, device="cuda")
        inputs["B"] = inputs["B"].cpu()
        with pytest.raises(ValueError, match="B is on cpu but u is on cuda"):
            selective_scan(**inputs)
