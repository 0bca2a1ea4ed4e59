"""pytest-benchmark suite of the scan: `pytest benchmarks/test_scan.py --benchmark-json=FILE`.

The same contenders as scan_cpu.py, which also compares them with the figures that are promised.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
sys.path.insert(0, str(Path(__file__).parent))

import scan_cpu
import scan_measure as measure

from mfuser_kernels.testing import errors, scan_inputs

ROUNDS = 5


@pytest.fixture(scope="module")
def contenders():
    torch.set_num_threads(2)
    assert max(errors(scan_inputs(2, 200, 48, 16, gate=False), "cpu").values()) < 1e-5
    return scan_cpu.contenders(measure.inputs(), compiled=False)


NAMES = [
    *(f"{b} forward" for b in ("cpu", "chunked", "reference", "mamba_ref", "transformers")),
    *(f"{b} forward + backward" for b in ("cpu", "chunked", "reference")),
    "exponentials alone",
]


@pytest.mark.parametrize("name", NAMES)
def test_scan(benchmark, contenders, name):
    benchmark.extra_info.update(measure.environment())
    benchmark.group = "forward + backward" if "+" in name else "forward"
    benchmark.pedantic(contenders[name], rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("name", ["associative_scan forward"])
def test_compiled(benchmark, name):
    """torch.compile of an associative scan: about a minute goes into the warm-up."""
    calls = scan_cpu.contenders(measure.inputs(), compiled=True)
    benchmark.extra_info.update(measure.environment())
    benchmark.group = "forward"
    benchmark.pedantic(calls[name], rounds=ROUNDS, warmup_rounds=1)
