"""The whole model: what trains, sliding windows, class texts, images of every type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

from mfuser import DecoderOutput, DGSSModel, MFuserError, Registry, build_model
from mfuser.model.sliding_window import sliding_window, window_origins


@pytest.fixture(scope="module")
def model(tiny: Registry) -> DGSSModel:
    return build_model("tiny", tiny)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, 19, (2, 64, 96))
    labels[:, :5] = 255
    return torch.rand(2, 3, 64, 96), labels


def test_losses_are_finite_named_scalars(model: DGSSModel) -> None:
    losses = model.train()(*batch())
    assert {"loss_cls", "loss_mask", "loss_dice", "loss_align"} <= set(losses)
    assert all(v.ndim == 0 and v.isfinite() for v in losses.values())


@pytest.mark.parametrize("pairing", ["tiny", "plain", "lone"])
def test_what_trains_gets_gradients_and_nothing_else_does(tiny: Registry, pairing: str) -> None:
    model = build_model(pairing, tiny).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        sum(model(*batch()).values()).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("encoder.vfm.", "encoder.vlm."))
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name
        assert torch.equal(parameter, before[name])


def test_every_trained_parameter_moves(tiny: Registry) -> None:
    """No part is wired past: a step changes each tensor (zero gradients at start are counted)."""
    model = build_model("tiny", tiny).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reached = dict.fromkeys(trained, False)
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    for _ in range(3):  # zero-initialized outputs open their inputs' gradients one step later
        optimizer.zero_grad()
        sum(model(*batch()).values()).backward()  # type: ignore[union-attr]
        for name, parameter in trained.items():
            reached[name] |= parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        optimizer.step()
    # Softmax over keys does not feel a constant shift of all of them.
    assert [n for n, seen in reached.items() if not seen and not n.endswith("k_proj.bias")] == []


def test_unfrozen_encoders_train(tiny: Registry) -> None:
    model = build_model("plain", tiny, vfm={"freeze": False}).train()
    sum(model(*batch()).values()).backward()  # type: ignore[union-attr]
    vfm = dict(model.encoder.vfm.named_parameters())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in vfm.values())
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in vfm.values()) > 10
    assert not any(p.requires_grad for p in model.encoder.vlm.parameters())  # type: ignore[union-attr]


def test_one_seed_one_model(tiny: Registry) -> None:
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    one, two, other = (build_model("tiny", tiny, seed=s).state_dict() for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


# ---- windows


@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 60))
def test_windows_cover_the_side_and_stay_inside(extra: int, window: int, stride: int) -> None:
    size, stride = window + extra - 1, min(stride, window)
    origins = window_origins(size, window, stride)
    covered = set()
    for origin in origins:
        assert 0 <= origin <= size - window
        covered |= set(range(origin, origin + window))
    assert covered == set(range(size))
    assert origins == sorted(set(origins))


def test_windows_of_the_released_models() -> None:
    assert window_origins(1024, 512, 341) == [0, 341, 512]
    assert window_origins(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]


def naive(
    scores: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
) -> torch.Tensor:
    _, _, height, width = images.shape
    total, count = None, torch.zeros(height, width)
    tops = [*range(0, height - window[0], stride[0]), height - window[0]]
    lefts = [*range(0, width - window[1], stride[1]), width - window[1]]
    for top in dict.fromkeys(tops):
        for left in dict.fromkeys(lefts):
            part = scores(images[:, :, top : top + window[0], left : left + window[1]])
            if total is None:
                total = torch.zeros(len(images), part.shape[1], height, width)
            total[:, :, top : top + window[0], left : left + window[1]] += part
            count[top : top + window[0], left : left + window[1]] += 1
    assert total is not None
    return total / count


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (64, 150), (101, 133)])
def test_segment_is_the_average_over_windows(model: DGSSModel, size: tuple[int, int]) -> None:
    model.eval()
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = naive(model.scores, images, (64, 96), (43, 64))
    got = model.segment(images)
    assert got.shape == (2, 19, *size)
    # Windows in other batches: float32 sums in another order.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    several = model.segment(images, window_batch=3)
    torch.testing.assert_close(several, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        dense = naive(model.scores, images, (64, 96), (20, 30))
    torch.testing.assert_close(model.segment(images, stride=(20, 30)), dense, rtol=1e-4, atol=1e-5)


def test_segment_refuses_what_it_cannot_do(model: DGSSModel) -> None:
    with pytest.raises(MFuserError, match="60x96 pixels is smaller than the window of 64x96"):
        model.segment(torch.rand(1, 3, 60, 96))
    with pytest.raises(MFuserError, match=r"shape \(1, 4, 64, 96\), not \(B, 3, H, W\)"):
        model.segment(torch.rand(1, 4, 64, 96))
    with pytest.raises(MFuserError, match="shape"):
        model.segment(torch.rand(64, 96))
    with pytest.raises(MFuserError, match="a stride of 65x96 leaves gaps"):
        model.segment(torch.rand(1, 3, 200, 200), stride=(65, 96))


@pytest.mark.parametrize(
    "stride",
    [0, -1, (0, 30), (30, -2), (30,), (1, 2, 3), 2.5, (20.0, 30), "341", True, (None, 30), []],
    ids=str,
)
def test_strides_that_make_no_sense(model: DGSSModel, stride: Any) -> None:
    for size in ((200, 200), (64, 96)):  # the one window of the latter needs none: refused too
        with pytest.raises(MFuserError, match="stride = .*: give one positive integer or"):
            model.segment(torch.rand(1, 3, *size), stride=stride)


def test_strides_that_do(model: DGSSModel) -> None:
    model.eval()
    images = torch.rand(1, 3, 101, 133)
    expected = model.segment(images, stride=(30, 30))
    for stride in (30, [30, 30], np.int64(30), torch.tensor(30)):
        assert torch.equal(model.segment(images, stride=stride), expected)  # type: ignore[arg-type]
    with pytest.raises(MFuserError, match="a stride of 65x65 leaves gaps"):
        model.segment(images, stride=65)
    for window_batch in (0, -1, 1.5, True):
        with pytest.raises(MFuserError, match="window_batch = .*: give a positive integer"):
            model.segment(images, window_batch=window_batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(64, 96), (101, 133)])
def test_segment_of_an_empty_batch_is_empty(model: DGSSModel, size: tuple[int, int]) -> None:
    for images in (torch.rand(0, 3, *size), torch.zeros(0, 3, *size, dtype=torch.uint8)):
        scores = model.segment(images)
        assert scores.shape == (0, 19, *size) and scores.dtype == torch.float32
    with pytest.raises(MFuserError, match="smaller than the window"):
        model.segment(torch.rand(0, 3, 60, 96))


def test_no_window_is_lost_to_gaps() -> None:
    ones = sliding_window(lambda w: w[:, :1] * 0 + 1, torch.rand(1, 3, 50, 70), (20, 30), (20, 30))
    assert torch.equal(ones, torch.ones(1, 1, 50, 70))


def test_uint8_and_float_images_are_one(model: DGSSModel) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(model.segment(images), model.segment(images.float() / 255))
    assert torch.equal(model.segment(images[0]), model.segment(images))


def test_whole_numbers_other_than_bytes_are_refused(model: DGSSModel) -> None:
    with pytest.raises(MFuserError, match=r"images are torch.int64; give uint8 \(0 to 255\) or"):
        model.segment(torch.randint(0, 256, (1, 3, 64, 96)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("decoder", ["text_mask2former", "mask2former", "linear"])
def test_a_model_of_another_precision_takes_every_image(
    tiny: Registry, dtype: torch.dtype, decoder: str
) -> None:
    small = {"width": 64, "pixel_layers": 1, "pixel_ffn": 64, "layers": 3, "ffn": 64}
    tables = {"mask2former": {"name": decoder, **small}, "linear": decoder}
    model = build_model("tiny", tiny, **{"decoder": tables[decoder]} if decoder in tables else {})
    pixels = torch.randint(0, 256, (1, 3, 100, 150), dtype=torch.uint8)
    expected = model.segment(pixels)
    model.to(dtype)
    # On average over pixels: a single one may flip a threshold of the masked attention.
    allowed = {torch.bfloat16: 0.01, torch.float16: 0.001, torch.float64: 1e-6}[dtype]
    for images in (pixels, pixels.float() / 255, pixels.double() / 255, (pixels / 255).to(dtype)):
        scores = model.segment(images)
        assert scores.dtype == (dtype if dtype == torch.float64 else torch.float32)
        if images.dtype == dtype and dtype != torch.float64:
            continue  # the pixels are rounded already
        assert (scores - expected).abs().mean() <= allowed * expected.abs().max()
        agreement = (scores.argmax(1) == expected.argmax(1)).float().mean()
        assert agreement >= 0.98, float(agreement)  # of an untrained model, full of ties


@pytest.mark.parametrize("decoder", ["text_mask2former", "mask2former", "linear"])
def test_scores_of_half_precision_are_not_rounded_again(tiny: Registry, decoder: str) -> None:
    options = {"decoder": decoder} if decoder != "text_mask2former" else {}
    part = build_model("tiny", tiny, **options).decoder
    masks, classes = torch.randn(1, 19, 8, 12).bfloat16(), torch.randn(1, 19, 20).bfloat16()
    scores = part.semantic_logits(DecoderOutput([masks], [classes]), (64, 96))
    exact = DecoderOutput([masks.float()], [classes.float()])
    assert torch.equal(scores, part.semantic_logits(exact, (64, 96)))


def test_windows_of_half_precision_are_summed_in_float32() -> None:
    """Sums in bfloat16 would round at every overlap, and not divide back to the value."""
    images = torch.rand(1, 3, 8, 40)
    value = torch.tensor(1 / 3).bfloat16()
    got = sliding_window(lambda w: value.expand(len(w), 1, 8, 8), images, (8, 8), (1, 1))
    assert torch.equal(got, value.float().expand(1, 1, 8, 40))


def test_segment_leaves_a_frozen_norm_frozen(model: DGSSModel) -> None:
    model.train()
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.eval()
    model.segment(torch.rand(1, 3, 64, 96))
    assert model.training and not norm.training
    norm.train()


def test_segment_leaves_the_mode_as_it_was(model: DGSSModel) -> None:
    model.train()
    running = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    model.segment(torch.rand(1, 3, 64, 96))
    assert model.training and model.decoder.training
    assert all(torch.equal(b, running[n]) for n, b in model.named_buffers() if n in running)
    model.eval()
    assert not model.segment(torch.rand(1, 3, 64, 96)).requires_grad
    assert not model.training


# ---- class texts


def other(values: torch.Tensor) -> torch.Tensor:
    """Not a shift of them all, which layer norms take out again."""
    return values.detach() + torch.linspace(-2, 2, values.numel()).view_as(values).to(values)


def in_place(model: DGSSModel) -> DGSSModel:
    with torch.no_grad():
        model.prompt.contexts.copy_(other(model.prompt.contexts))  # type: ignore[union-attr]
    return model


def by_data(model: DGSSModel) -> DGSSModel:
    model.prompt.contexts.data.copy_(other(model.prompt.contexts))  # type: ignore[union-attr]
    return model


def replaced(model: DGSSModel) -> DGSSModel:
    changed = other(model.prompt.contexts)  # type: ignore[union-attr]
    model.prompt.contexts = torch.nn.Parameter(changed)  # type: ignore[union-attr]
    return model


def by_numpy(model: DGSSModel) -> DGSSModel:
    model.prompt.contexts.detach().numpy()[:] *= -1  # type: ignore[union-attr]
    return model


def by_an_optimizer(model: DGSSModel) -> DGSSModel:
    contexts = model.prompt.contexts  # type: ignore[union-attr]
    contexts.grad = torch.randn_like(contexts)
    torch.optim.SGD([contexts], lr=1.0).step()
    return model


def by_a_part(model: DGSSModel) -> DGSSModel:
    model.prompt.load_state_dict({"contexts": other(model.prompt.contexts)})  # type: ignore[union-attr]
    return model


def by_the_whole(model: DGSSModel) -> DGSSModel:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["prompt.contexts"] = other(state["prompt.contexts"])
    model.load_state_dict(state)
    return model


def averaged(model: DGSSModel) -> DGSSModel:
    average = AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(in_place(model))
    return average.module  # type: ignore[no-any-return]


def copied(model: DGSSModel) -> DGSSModel:
    return in_place(copy.deepcopy(model))


def other_ids(model: DGSSModel) -> DGSSModel:
    model.ids.copy_(model.ids.roll(1, 0))  # type: ignore[operator, union-attr]
    return model


def other_tower(model: DGSSModel) -> DGSSModel:
    for parameter in model.encoder.vlm.model.transformer.parameters():  # type: ignore
        parameter.data.copy_(other(parameter))
    return model


def other_enhancer(model: DGSSModel) -> DGSSModel:
    for parameter in model.enhancer.parameters():
        parameter.data.copy_(other(parameter))
    return model


def other_precision(model: DGSSModel) -> DGSSModel:
    return in_place(model.double()).float()


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        by_data,
        replaced,
        by_numpy,
        by_an_optimizer,
        by_a_part,
        by_the_whole,
        averaged,
        copied,
        other_ids,
        other_tower,
        other_enhancer,
        other_precision,
    ],
)
def test_segment_follows_whatever_changes_the_texts(
    tiny: Registry, change: Callable[[DGSSModel], DGSSModel]
) -> None:
    """The same scores as a model that was built, changed alike and has never answered before."""
    image = torch.rand(1, 3, 64, 96)
    model = build_model("tiny", tiny)
    before = model.segment(image)
    torch.manual_seed(7)
    after = change(model).segment(image)
    torch.manual_seed(7)
    expected = change(build_model("tiny", tiny)).segment(image)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-4


def test_texts_are_computed_once_per_call(tiny: Registry) -> None:
    model = build_model("tiny", tiny)
    vlm = model.encoder.vlm
    assert vlm is not None
    calls = []
    original = vlm.encode_text
    vlm.encode_text = lambda *a: (calls.append(1), original(*a))[1]  # type: ignore[method-assign]
    model.segment(torch.rand(1, 3, 200, 200))  # many windows
    assert len(calls) == 1
    model.train()(*batch())
    assert len(calls) == 2


def test_text_has_a_gradient_to_the_prompt_even_in_eval_mode(tiny: Registry) -> None:
    model = build_model("tiny", tiny).eval()
    model.segment(torch.rand(1, 3, 64, 96))
    model.text().sum().backward()
    assert model.prompt is not None and model.prompt.contexts.grad is not None
