from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import below, close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfuser import MFuserError, TokenShape, load_registry
from mfuser_kernels.testing import relative_rms
from mfuser_plugins.fusion import _blocks
from mfuser_plugins.fusion.mvfuser import (
    MVFuser,
    MVFuserSpec,
    reading_order,
)


def scan(width: int, **options: Any) -> MVFuser:
    return MVFuser(width, MVFuserSpec(**options))


def randomized(width: int, state_size: int) -> MVFuser:
    """A module in which every branch matters."""
    module = scan(width, state_size=state_size, dropout=0.0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


def by_loops(module: MVFuser, tokens: Tensor) -> Tensor:
    """MVFuser written out: one token, one step at a time."""
    p = {name: value.detach() for name, value in module.named_parameters()}
    n = p["A_log"].shape[1]
    rank = p["dt_proj.weight"].shape[1]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def convolve(x: Tensor, kernel: Tensor) -> Tensor:
        padded = torch.cat([torch.zeros(1, x.shape[1]), x, torch.zeros(1, x.shape[1])]).to(x)
        return torch.stack([(padded[i : i + 3] * kernel.T).sum(0) for i in range(len(x))])

    outs = []
    for sequence in tokens:
        x, z = (sequence @ p["in_proj.weight"].T).chunk(2, 1)
        x = silu(convolve(x, p["conv1d_x.weight"][:, 0]))
        z = silu(convolve(z, p["conv1d_z.weight"][:, 0]))
        state = torch.zeros_like(p["A_log"])
        rows = []
        for u, gate in zip(x, z, strict=True):
            dt, b, c = (p["x_proj.weight"] @ u).split([rank, n, n])
            step = p["dt_proj.weight"] @ dt + 2 * p["dt_proj.bias"]
            step = torch.log1p(torch.exp(step))[:, None]
            state = torch.exp(-step * p["A_log"].exp()) * state + step * b * u[:, None]
            y = state @ c + p["D"] * u
            y = y / (y.square().mean() + 1e-5).sqrt() * p["norm.weight"]
            rows.append(p["out_proj.weight"] @ (y * silu(gate)) * p["scale"])
        outs.append(torch.stack(rows))
    return torch.stack(outs)


@pytest.mark.parametrize(("width", "state_size", "length"), [(32, 4, 1), (20, 3, 9), (48, 16, 40)])
def test_equals_the_equations(width: int, state_size: int, length: int) -> None:
    torch.manual_seed(width)
    module = randomized(width, state_size)
    tokens = torch.randn(2, length, width, dtype=torch.float64)
    assert close(module(tokens), by_loops(module, tokens), 1e-9)


def test_gradients_are_those_of_the_outputs() -> None:
    torch.manual_seed(1)
    module = randomized(16, 2)
    tokens = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (tokens,))


@pytest.mark.parametrize("case", ["m64.L37", "m64.L130", "init64.L37"])
def test_equals_the_released_module(case: str) -> None:
    file = golden("mvfuser")
    module = scan(64).eval()
    module.load_state_dict(below(file, f"{case.split('.')[0]}.param."))
    wanted = below(file, f"{case}.")
    tokens = wanted["x"].requires_grad_()
    out = module(tokens)
    (out * wanted["w"]).sum().backward()
    assert close(out, wanted["out"])
    assert tokens.grad is not None and close(tokens.grad, wanted["grad_x"])
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert close(parameter.grad, wanted[f"grad.{name}"]), name


def test_parameters_at_the_paper_s_size() -> None:
    assert sum(p.numel() for p in scan(1024).parameters()) == 1_667_585


def test_starts_near_zero_with_mamba_s_steps() -> None:
    torch.manual_seed(0)
    module = scan(64)
    steps = torch.nn.functional.softplus(module.dt_proj.bias)
    assert 0.00099 < steps.min() < steps.max() < 0.101
    assert torch.equal(module.A_log.exp()[0].round(), torch.arange(1.0, 17.0))
    tokens = torch.randn(2, 30, 64)
    assert 0 < module(tokens).abs().max() < 0.01


def test_dropout_only_while_training() -> None:
    torch.manual_seed(0)
    module = scan(32, dropout=0.5)
    tokens = torch.randn(1, 20, 32)
    assert 0.3 < (module(tokens) == 0).float().mean() < 0.7
    module.eval()
    assert torch.equal(module(tokens), module(tokens))
    assert (module(tokens) != 0).all()


towers = st.builds(
    TokenShape,
    embed_dim=st.integers(1, 12).map(lambda n: 2 * n),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_prefix_tokens=st.integers(0, 5),
)


@settings(max_examples=40, deadline=None)
@given(
    vfm=towers | st.none(),
    vlm=towers,
    swap=st.booleans(),
    shared_width=st.none() | st.just(10),
    project=st.none() | st.just(True),
)
def test_offsets_have_the_shape_of_the_tokens(
    vfm: TokenShape | None,
    vlm: TokenShape | None,
    swap: bool,
    shared_width: int | None,
    project: bool | None,
) -> None:
    if swap:
        vfm, vlm = vlm, vfm
    spec = MVFuserSpec(state_size=2, shared_width=shared_width, project=project)
    adapter = spec.build(vfm, vlm)
    tokens = [torch.randn(2, t.num_tokens, t.embed_dim) if t else None for t in (vfm, vlm)]
    offsets = adapter(*tokens, vfm and vfm.grid, vlm and vlm.grid)
    for token, offset in zip(tokens, offsets, strict=True):
        assert (token is None) == (offset is None)
        if token is not None:
            assert offset.shape == token.shape
            assert offset.abs().max() < 0.1
    sum(offset.sum() for offset in offsets if offset is not None).backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_vfm_comes_first_and_one_way() -> None:
    # The scan reads VFM, then VLM: but for the convolution across the seam, the VFM's offsets
    # cannot depend on the VLM, while the VLM's do depend on the VFM.
    torch.manual_seed(0)
    shape = TokenShape(16, (3, 3), 1)
    adapter = MVFuserSpec().build(shape, shape).eval()
    vfm, vlm = torch.randn(2, 1, 10, 16)
    first, second = adapter(vfm, vlm)
    other_vlm = adapter(vfm, torch.randn_like(vlm))
    other_vfm = adapter(torch.randn_like(vfm), vlm)
    assert torch.equal(first[:, :9], other_vlm[0][:, :9])
    assert not torch.allclose(second, other_vfm[1], rtol=1e-3, atol=0)
    joint = adapter.mvfuser(torch.cat([vfm, vlm], 1))
    assert torch.equal(torch.cat([first, second], 1), joint)


def test_maps_only_where_they_are_needed() -> None:
    def keys(vfm: int | None, vlm: int | None, **options: int | bool) -> set[str]:
        towers = [w and TokenShape(w, (2, 2), 0) for w in (vfm, vlm)]
        state = MVFuserSpec(**options).build(*towers).state_dict()
        return {k.split(".")[0] for k in state} - {"mvfuser"}

    assert keys(8, 8) == keys(8, None) == keys(None, 8) == set()
    assert keys(8, 12) == keys(8, 8, project=True) == {"vfm_in", "vfm_out"}
    assert keys(12, 8, shared_width=12) == {"vlm_in", "vlm_out"}
    assert len(keys(8, 8, shared_width=6)) == 4


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(MFuserError, match="VFM 8, VLM 12.*leave project out"):
        MVFuserSpec(project=False).build(TokenShape(8, (2, 2), 0), TokenShape(12, (2, 2), 0))
    with pytest.raises(MFuserError, match="width of 9.*shared_width.*10"):
        MVFuserSpec().build(None, TokenShape(9, (2, 2), 0))
    MVFuserSpec(shared_width=10).build(None, TokenShape(9, (2, 2), 0))


def test_options_of_ours_leave_the_released_module_as_it_is() -> None:
    torch.manual_seed(3)
    plain = scan(16, state_size=2)
    torch.manual_seed(3)
    both = scan(16, state_size=2, bidirectional="sum")
    assert not any(name.startswith("reverse") for name in plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, both.state_dict()[name]), name


@pytest.mark.parametrize("how", [True, "sum", "concat"])
def test_bidirectional_reads_from_both_ends(how: bool | str) -> None:
    module = scan(16, state_size=2, dropout=0.0, bidirectional=how).double()  # type: ignore[arg-type]
    tokens = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    # Beyond the convolutions' reach (one token) only a scan carries anything.
    for asked, other in ((1, 7), (7, 1)):
        (gradient,) = torch.autograd.grad(module(tokens)[0, asked].sum(), tokens)
        assert gradient[0, other].abs().max() > 0
    one_way = scan(16, state_size=2, dropout=0.0).double()
    (gradient,) = torch.autograd.grad(one_way(tokens)[0, 1].sum(), tokens)
    assert gradient[0, 7].abs().max() == 0


def test_bidirectional_sum_of_equal_scans_is_symmetric() -> None:
    module = randomized(16, 2)
    both = scan(16, state_size=2, dropout=0.0, bidirectional="sum").double()
    both.load_state_dict(
        module.state_dict()
        | {f"reverse.{k}": v for k, v in module.state_dict().items() if k[:2] in ("x_", "dt", "A_")}
        | {"reverse.D": module.D.detach()}
    )
    with torch.no_grad():  # a kernel that reads the same from both ends
        for conv in (both.conv1d_x, both.conv1d_z):
            conv.weight[..., 2] = conv.weight[..., 0]
    tokens = torch.randn(1, 7, 16, dtype=torch.float64)
    assert close(both(tokens.flip(1)).flip(1), both(tokens), 1e-9)


@given(vfm=st.integers(1, 9), vlm=st.integers(1, 9))
def test_reading_orders(vfm: int, vlm: int) -> None:
    device = torch.device("cpu")
    v, t = list(range(vfm)), list(range(vfm, vfm + vlm))
    assert reading_order([vfm, vlm], "vfm_first", device).tolist() == v + t
    assert reading_order([vfm, vlm], "vlm_first", device).tolist() == t + v
    mixed = reading_order([vfm, vlm], "interleaved", device).tolist()
    assert sorted(mixed) == v + t
    assert [i for i in mixed if i < vfm] == v and [i for i in mixed if i >= vfm] == t
    if vfm == vlm:
        assert mixed == [i for pair in zip(v, t, strict=True) for i in pair]


def test_order_decides_who_sees_whom() -> None:
    shape = TokenShape(8, (2, 3), 0)

    def seen(order: str) -> tuple[bool, bool]:
        """Whether the VFM's first token hears of the VLM's last, and the other way round."""
        adapter = MVFuserSpec(state_size=2, order=order).build(shape, shape).double()
        vfm, vlm = torch.randn(2, 1, 6, 8, dtype=torch.float64).requires_grad_().unbind()
        a, b = adapter(vfm, vlm)
        (first,) = torch.autograd.grad(a[0, 0].sum(), vlm, retain_graph=True)
        (second,) = torch.autograd.grad(b[0, 0].sum(), vfm)
        return bool((first[0, 5] != 0).any()), bool((second[0, 4] != 0).any())

    assert seen("vfm_first") == (False, True)
    assert seen("vlm_first") == (True, False)
    assert seen("interleaved") == (False, False)


@pytest.mark.parametrize(
    "batch, length", [(1, 63), (1, 64), (1, 129), (2, 200), (3, 65), (200, 70)]
)
def test_inference_in_blocks_is_the_forward_of_training(
    monkeypatch: pytest.MonkeyPatch, batch: int, length: int
) -> None:
    """Blocks of at most 128 tokens, in which neighbors and state of the blocks before count."""
    monkeypatch.setattr(_blocks, "BLOCK", 128)
    torch.manual_seed(0)
    module = scan(16, state_size=4).eval()
    tokens = torch.randn(batch, length, 16)
    whole = module(tokens)
    assert whole.requires_grad
    with torch.no_grad():
        assert relative_rms(module(tokens), whole) < 1e-6


def test_the_released_maps_back_start_with_a_bias() -> None:
    """CLIP's `adapter_proj2`: uniform up to the root of one over the width, bias included."""
    shape = TokenShape(64, (2, 2), 1)
    ours = MVFuserSpec(state_size=2, project=True).build(shape, shape)
    released = MVFuserSpec(state_size=2, project=True, init="released").build(shape, shape)
    assert not ours.vfm_out.bias.any()
    for part in (released.vfm_in, released.vfm_out):
        assert part.weight.abs().max() <= 1 / 8 and 1 / 9 < part.bias.abs().max() <= 1 / 8
    assert load_registry().pairing("dinov2-l_clip-l").fusion == MVFuserSpec(
        project=True, init="released"
    )
