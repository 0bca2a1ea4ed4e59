"""Any shape with any options: what hypothesis finds must agree with the reference in float64."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mfuser_kernels.testing import errors, scan_inputs

groups_and_share = st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 40))


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    backend=st.sampled_from(["cpu", "chunked"]),
    batch=st.integers(1, 3),
    length=st.integers(1, 140),
    channels=groups_and_share,
    states=st.sampled_from([1, 2, 5, 16, 17, 33]),
    grouped=st.booleans(),
    constant=st.sampled_from(["", "B", "C", "BC"]),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("skip", "gate", "bias", "softplus", "start")}
    ),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_scan(backend, batch, length, channels, states, grouped, constant, flags, half, seed):
    groups, share = channels
    inputs = scan_inputs(
        batch,
        length,
        groups * share,
        states,
        groups=groups if grouped else None,
        constant=constant,
        dtype=torch.bfloat16 if half else torch.float32,
        seed=seed,
        **flags,
    )
    found = errors(inputs, backend)
    # A gradient of one or two numbers can be a small difference of large ones.
    tolerance = 3e-2 if half else 3e-5
    assert all(error < tolerance for error in found.values()), found
