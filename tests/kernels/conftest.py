"""What the tests of the scan share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfuser_kernels.testing import run_scan, scan_inputs


@pytest.fixture(scope="session")
def long_scan() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Inputs of 20,000 steps and their exact results: the reference in float64 takes seconds."""
    inputs = scan_inputs(1, 20000, 2, 3)
    return inputs, run_scan(inputs, "reference", torch.float64)
