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


BOTH = "forward + backward"
NAMES = [
    *(f"{b} forward" for b in ("cpu", "chunked", "reference", "mamba_ref", "transformers")),
    *(f"{b} {BOTH}" for b in ("cpu", "chunked", "reference")),
    *(f"mambapy {what}" for what in ("forward", BOTH)),
    "exponentials alone",
]


def run(benchmark, calls, name):
    if name not in calls:
        pytest.skip(f"{name.split()[0]} is not installed")
    benchmark.extra_info.update(measure.environment())
    benchmark.group = BOTH if BOTH in name else "forward"
    benchmark.pedantic(calls[name], rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("name", NAMES)
def test_scan(benchmark, contenders, name):
    run(benchmark, contenders, name)


@pytest.fixture(scope="module")
def compiled():
    """torch.compile of an associative scan: about a minute goes into compiling."""
    torch.set_num_threads(2)
    return scan_cpu.contenders(measure.inputs(), compiled=True)


@pytest.mark.parametrize("name", [f"associative_scan {what}" for what in ("forward", BOTH)])
def test_compiled(benchmark, compiled, name):
    run(benchmark, compiled, name)
