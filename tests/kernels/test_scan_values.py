"""Every backend against the reference in float64: outputs, last state, each gradient by name."""

from __future__ import annotations

import pytest
import torch
from golden import below, golden

from mfuser_kernels import selective_scan
from mfuser_kernels.testing import errors, relative_rms, run_scan, scan_inputs

BACKENDS = ["cpu", "chunked", "associative"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


EXACT = {}


def exact(inputs, *key):
    """The results of the reference in float64, for all backends: `key` tells inputs apart."""
    if key not in EXACT:
        EXACT[key] = run_scan(inputs, "reference", torch.float64)
    return EXACT[key]


def assert_close(inputs, backend, exact, tolerance=1e-5):
    found = errors(inputs, backend, exact=exact)
    bad = {name: error for name, error in found.items() if not error < tolerance}
    assert not bad, bad


# (batch, length, width, states): every length, width and number of states that is promised.
SHAPES = [
    (2, 1, 7, 3),
    (1, 2, 1, 1),
    (2, 31, 48, 16),
    (1, 33, 500, 3),
    (2, 63, 16, 8),
    (1, 64, 512, 16),
    (2, 65, 7, 64),
    (3, 130, 48, 3),
    (1, 130, 16, 20),
    (1, 257, 500, 16),
    (2, 257, 1, 8),
    (1, 2594, 16, 16),
    (1, 2594, 48, 1),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, backend):
    inputs = scan_inputs(*shape)
    assert_close(inputs, backend, exact(inputs, shape))


@pytest.mark.parametrize("shape", [(1, 257, 7, 3), (2, 1000, 3, 5)], ids=str)
def test_chunks_in_float64_are_exact(shape):
    """They stand for the reference where that takes too long."""
    inputs = scan_inputs(*shape, start=True)
    found = run_scan(inputs, "chunked", torch.float64)
    worst = {k: relative_rms(found[k], t) for k, t in exact(inputs, shape, "start").items()}
    assert max(worst.values()) < 1e-12, worst


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequence(long_scan, backend):
    assert_close(long_scan[0], backend, long_scan[1])


OPTIONS = [
    {"skip": False, "gate": False, "bias": False, "softplus": False},
    {"skip": True, "gate": False, "bias": True, "softplus": True},
    {"skip": False, "gate": True, "bias": False, "softplus": True},
    {"skip": True, "gate": True, "bias": True, "softplus": False, "start": True},
    {"start": True, "groups": 1},
    {"groups": 4},
    {"constant": "B"},
    {"constant": "C", "groups": 2},
    {"constant": "BC", "start": True},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, backend):
    inputs = scan_inputs(2, 150, 24, 5, **options)
    assert_close(inputs, backend, exact(inputs, "options", *options.items()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, backend):
    inputs = scan_inputs(2, 130, 40, 16, start=True, dtype=dtype)
    assert_close(inputs, backend, exact(inputs, dtype), 1e-2)
    found = run_scan(inputs, backend)
    assert found["out"].dtype == dtype and found["last_state"].dtype == torch.float32
    for name, t in inputs.items():
        if isinstance(t, torch.Tensor):
            assert found[f"grad {name}"].dtype == t.dtype, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend):
    inputs = scan_inputs(2, 70, 40, 4)
    inputs["u"] = inputs["u"].bfloat16()
    inputs["B"] = inputs["B"].half()
    assert_close(inputs, backend, exact(inputs, "mixed"), 1e-2)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rounded", ["u", "delta", "z", "B", "C", "initial_state"])
def test_each_input_keeps_its_own_precision(rounded, backend):
    """One input in bfloat16 rounds none of the others: as exact as if it came in float32."""
    inputs = scan_inputs(1, 300, 24, 5, start=True)
    inputs["delta"] = 0.05 * inputs["delta"]  # bfloat16 changes it by a fiftieth of its size
    inputs[rounded] = inputs[rounded].bfloat16()
    state_error = errors(inputs, backend, exact=exact(inputs, "rounded", rounded))["last_state"]
    assert state_error < 1e-6
    widened = dict(inputs, **{rounded: inputs[rounded].float()})
    found, wide = run_scan(inputs, backend), run_scan(widened, backend)
    assert found["out"].dtype == inputs["u"].dtype
    assert torch.equal(found["out"], wide["out"].to(found["out"].dtype))
    for name in ("delta", "z", "A", "B"):
        if rounded != "u":  # of that the output is rounded, and with it the gradient that comes in
            of_own = wide[f"grad {name}"].to(found[f"grad {name}"].dtype)
            assert torch.equal(found[f"grad {name}"], of_own), name


def extreme(name):
    inputs = scan_inputs(2, 200, 40, 4, gate=False)
    if name == "huge delta":
        inputs["delta"] = 10 + 60 * inputs["delta"]
    elif name == "tiny delta":
        inputs["delta"], inputs["delta_bias"] = inputs["delta"] - 12, 0 * inputs["delta_bias"]
    elif name == "strongly negative A":
        inputs["A"] = inputs["A"] * 1e4
    elif name == "slightly positive A":
        inputs["A"] = inputs["A"].abs() * 1e-2
    elif name == "growing and decaying A":
        inputs["A"][:, ::2] *= -0.05
    elif name == "zero A":
        inputs["A"] = inputs["A"] * 0
    elif name == "negative delta":
        inputs["delta_softplus"] = False
        inputs["delta"], inputs["delta_bias"] = inputs["delta"] * 0.05, inputs["delta_bias"] * 0
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "huge delta",
        "tiny delta",
        "strongly negative A",
        "slightly positive A",
        "growing and decaying A",
        "zero A",
        "negative delta",
    ],
)
def test_extreme_values(name, backend):
    inputs = extreme(name)
    assert_close(inputs, backend, exact(inputs, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_inputs_give_zero(backend):
    inputs = scan_inputs(2, 70, 40, 4)
    inputs["u"] = inputs["u"] * 0
    out, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert (out == 0).all() and (last == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_not_a_number_stays_where_it_belongs(name, value, backend):
    """Before its step, and in other batch items and channels, nothing changes, to the bit."""
    inputs = scan_inputs(2, 150, 40, 5, softplus=True)
    clean = selective_scan(**inputs, backend=backend)
    index = (1, 70, 3)
    inputs[name] = inputs[name].clone()
    inputs[name][index] = value
    out = selective_scan(**inputs, backend=backend)
    same = torch.ones_like(out, dtype=torch.bool)
    if name in ("u", "delta"):
        same[1, 70:, 3] = False
    elif name == "B":
        same[1, 70:] = False
    elif name == "C":
        same[1, 70] = False
    else:
        same[index] = False
    assert torch.equal(out[same], clean[same])
    assert not torch.isfinite(out[1, 70, 3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["delta_bias", "A", "D"])
def test_not_a_number_in_a_parameter_stays_in_its_channel(name, backend):
    inputs = scan_inputs(2, 40, 40, 5)
    clean = selective_scan(**inputs, backend=backend)
    inputs[name] = inputs[name].clone()
    inputs[name][3] = float("nan")
    out = selective_scan(**inputs, backend=backend)
    others = [d for d in range(40) if d != 3]
    assert torch.equal(out[..., others], clean[..., others])
    assert torch.isnan(out[:, 1:, 3]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_not_a_number_stays_in_its_channel(backend):
    inputs = scan_inputs(2, 150, 40, 5, gate=False)
    clean = run_scan(inputs, backend)["grad u"]
    inputs["u"] = inputs["u"].clone()
    inputs["u"][1, 70, 3] = float("nan")
    grad = run_scan(inputs, backend)["grad delta"]
    assert torch.isnan(grad[1, 70:, 3]).any()
    assert torch.isfinite(grad[0]).all()
    assert torch.isfinite(grad[1][:, [d for d in range(40) if d != 3]]).all()
    assert torch.isfinite(clean).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_layouts_agree_and_take_any_strides(backend):
    inputs = scan_inputs(2, 65, 40, 5, groups=2)
    expected = selective_scan(**inputs, backend=backend)
    moved = dict(inputs, layout="bdl")
    for name in ("u", "delta", "z"):
        moved[name] = inputs[name].transpose(1, 2)
    for name in ("B", "C"):
        moved[name] = inputs[name].permute(0, 2, 3, 1)
    out = selective_scan(**moved, backend=backend)
    assert out.shape == (2, 40, 65) and out.is_contiguous()  # callers of mamba-ssm take views
    assert torch.equal(out.transpose(1, 2), expected)
    wide = torch.randn(2, 65, 80)[..., ::2]  # every second channel
    assert torch.equal(
        selective_scan(**dict(inputs, u=wide), backend=backend),
        selective_scan(**dict(inputs, u=wide.contiguous()), backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_initial_state_continues_a_sequence(backend):
    whole = scan_inputs(2, 150, 40, 5, gate=False)
    expected, last = selective_scan(**whole, return_last_state=True, backend=backend)
    state, outs = None, []
    for part in (slice(0, 70), slice(70, 150)):
        cut = {k: whole[k][:, part] for k in ("u", "delta", "B", "C")}
        out, state = selective_scan(
            **{**whole, **cut}, initial_state=state, return_last_state=True, backend=backend
        )
        outs.append(out)
    assert relative_rms(torch.cat(outs, 1), expected) < 1e-6
    assert relative_rms(state, last) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_the_last_state_alone(backend):
    inputs = scan_inputs(1, 70, 8, 4, gate=False)
    grads = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        u = inputs["u"].clone().to(dtype).requires_grad_()
        rest = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        selective_scan(**{**rest, "u": u}, return_last_state=True, backend=name)[1].sum().backward()
        grads.append(u.grad)
    assert relative_rms(*grads) < 1e-5


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_mamba_reference_implementation(backend):
    """Values and gradients that mamba-ssm's selective_scan_ref gave, layout (B, D, L)."""
    file = golden("selective_scan")
    cases = sorted({key.split(".")[0] for key in file})
    assert cases
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    for case in cases:
        wanted = below(file, f"{case}.")
        given = {name: wanted[name].requires_grad_() for name in names if name in wanted}
        softplus = bool(wanted["delta_softplus"])
        out, last = selective_scan(
            **given, delta_softplus=softplus, return_last_state=True, backend=backend
        )
        (out * wanted["w"]).sum().backward()
        found = {"out": out, "last_state": last}
        found |= {f"grad_{name}": t.grad for name, t in given.items()}
        for name, value in found.items():
            error = relative_rms(value.detach(), wanted[name])
            assert error < 2e-5, (case, name, error)
