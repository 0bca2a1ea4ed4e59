"""Fixtures shared by the tests of the scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfuser_kernels.testing import run_scan, scan_inputs


@pytest.fixture(scope="session")
def long_scan() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Inputs of 20,000 steps and their exact results, which would take the reference 13 s."""
    inputs = scan_inputs(1, 20000, 2, 3)
    return inputs, run_scan(inputs, "chunked", torch.float64)
