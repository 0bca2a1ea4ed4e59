from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import below, close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small import MASK_DECODER
from torch import Tensor

from mfuser import DecoderOutput, MFuserError
from mfuser_plugins.decoders._mask_decoder import background
from mfuser_plugins.decoders.mask2former import Mask2FormerSpec
from mfuser_plugins.decoders.text_mask2former import TextMask2Former, TextMask2FormerSpec


def small(channels: int = 6, classes: int = 5, text_dim: int = 7) -> TextMask2Former:
    torch.manual_seed(0)
    return TextMask2FormerSpec(**MASK_DECODER).build((channels,) * 4, classes, text_dim)


def pyramid(*sizes: tuple[int, int], batch: int = 2, channels: int = 6) -> list[Tensor]:
    return [torch.randn(batch, channels, *size) for size in sizes]


def test_equals_the_released_decoder() -> None:
    file = golden("decoder")
    wanted = below(file, "b.")
    spec = TextMask2FormerSpec(width=32, pixel_layers=2, pixel_ffn=64, layers=3, ffn=96)
    decoder = spec.build((24,) * 4, 19, 48).eval()
    decoder.load_state_dict(below(file, "param."))
    features = [wanted[f"feat{i}"].requires_grad_() for i in range(4)]
    text = wanted["text"].requires_grad_()

    mask_feature, levels = decoder.pixel_decoder(features, text)
    assert close(mask_feature, wanted["mask_feature"])
    for i, level in enumerate(levels):
        assert close(level, wanted[f"multi_scale{i}"])

    output = decoder(features, text)
    assert len(output.masks) == len(output.classes) == 4
    loss = torch.zeros(())
    for i, (masks, classes) in enumerate(zip(output.masks, output.classes, strict=True)):
        assert close(masks[..., ::2, ::2], wanted[f"mask{i}"]) and close(classes, wanted[f"cls{i}"])
        loss = loss + (masks * wanted[f"wmask{i}"]).sum() + (classes * wanted[f"wcls{i}"]).sum()
    assert close(decoder.semantic_logits(output, (16, 16))[..., ::2, ::2], wanted["score"])
    prediction = decoder.semantic_logits(output, (64, 64)).argmax(1)
    assert torch.equal(prediction, wanted["score_resized_argmax"].long())

    loss.backward()
    assert text.grad is not None and close(text.grad, wanted["grad_text"])
    for i, feature in enumerate(features):
        assert feature.grad is not None and close(feature.grad, wanted[f"grad_feat{i}"])
    for name, parameter in decoder.named_parameters():
        want = wanted[f"grad.{name}"]
        assert parameter.grad is not None
        if "input_convs" in name and name.endswith("conv.bias"):
            # One channel per group here: the norm takes this bias away again, and what is left
            # of its gradient is rounding.
            assert want.abs().max() < 1e-4 and parameter.grad.abs().max() < 1e-4
        else:
            assert close(parameter.grad, want), name


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=4),
    batch=st.integers(1, 2),
    classes=st.integers(1, 4),
)
def test_pyramids_of_any_sizes(sizes: list[tuple[int, int]], batch: int, classes: int) -> None:
    decoder = small(classes=classes)
    output = decoder(pyramid(*sizes, batch=batch), torch.randn(batch, classes, 7))
    assert all(m.shape == (batch, classes, *sizes[0]) for m in output.masks)
    assert all(c.shape == (batch, classes, classes + 1) for c in output.classes)
    scores = decoder.semantic_logits(output, (11, 13))
    assert scores.shape == (batch, classes, 11, 13)
    assert scores.min() >= 0 and scores.max() <= classes + 1e-4


def test_every_parameter_learns_from_the_loss() -> None:
    decoder = small()
    output = decoder(pyramid((9, 7), (5, 4), (3, 2), (2, 1)), torch.randn(2, 5, 7))
    labels = torch.randint(0, 5, (2, 33, 26))
    losses = decoder.loss(output, labels)
    names = {f"loss_{part}" for part in ("cls", "mask", "dice")}
    assert set(losses) == names | {f"d{i}.{name}" for i in range(3) for name in names}
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_start_is_the_released_one() -> None:
    """The convolutions as mmcv's ConvModule draws them; all else as PyTorch and Deformable DETR."""
    spec = TextMask2FormerSpec(pixel_layers=1, layers=1)
    decoder = spec.build((2048,) * 4, 19, 768)
    pixels = decoder.pixel_decoder
    convs = [*pixels.input_convs, *pixels.lateral_convs, *pixels.output_convs]
    assert len(convs) == 5
    for conv in (c.conv for c in convs):
        # Fan out: 256 filters of 1x1 or 3x3; 0.0884 and 0.0295, PyTorch's are 0.0128 and 0.0120.
        # At least 500,000 values: the estimate is off by 0.1 %.
        wanted = (2 / (256 * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(wanted, rel=0.01)
        assert conv.weight.mean().abs() < wanted / 100 and conv.weight.abs().max() > 4 * wanted
        assert conv.bias is None or not conv.bias.any()
    assert [c.conv.bias is None for c in convs] == [False, False, False, True, True]
    # No ConvModule in the release: uniform up to the root of one over the inputs.
    assert 0.99 < pixels.mask_feature.weight.abs().max() * 256**0.5 <= 1
    assert pixels.mask_feature.bias.any()
    for embedding in (pixels.level_encoding, pixels.text_pos_embed, decoder.query_embed,
                      decoder.level_embed):  # fmt: skip
        assert embedding.weight.std().item() == pytest.approx(1, abs=0.1)


def test_pytorchs_start_is_an_option_and_mask2formers_own() -> None:
    spec = TextMask2FormerSpec(**MASK_DECODER, init="pytorch")
    for decoder in (
        spec.build((6,) * 4, 5, 7),
        Mask2FormerSpec(**MASK_DECODER, queries=5).build((6,) * 4, 5, None),
    ):
        for conv in (c.conv for c in decoder.pixel_decoder.input_convs):
            assert 0.8 < conv.weight.abs().max() * 6**0.5 <= 1 and conv.bias.any()
    with pytest.raises(ValidationError, match="'released' or 'pytorch'"):
        TextMask2FormerSpec(init="kaiming")


def test_points_can_be_given() -> None:
    decoder = small()
    output = decoder(pyramid((8, 8), (4, 4), (2, 2), (1, 1)), torch.randn(2, 5, 7))
    labels = torch.tensor([0, 3, 255]).repeat(2, 8, 4)
    points = [torch.rand(4, 10, 2) for _ in output.masks]
    first, second = (decoder.loss(output, labels, points) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The i-th prediction takes the i-th points; the last one has no prefix.
    points[1] = torch.rand(4, 10, 2)
    third = decoder.loss(output, labels, points)
    changed = {name for name in first if not torch.equal(first[name], third[name])}
    assert changed == {"d1.loss_mask", "d1.loss_dice"}


def test_scores_by_hand() -> None:
    classes = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]]])
    masks = torch.tensor([[[[0.0, 5.0]], [[-1.0, 1.0]]]])
    scores = small(classes=2).semantic_logits(DecoderOutput([masks], [classes]), (1, 2))
    p, m = classes[0].softmax(-1), masks[0].sigmoid()
    for k in range(2):
        for x in range(2):
            want = p[0, k] * m[0, 0, x] + p[1, k] * m[1, 0, x]
            assert torch.isclose(scores[0, k, 0, x], want)


def test_background_is_hidden_unless_all_is() -> None:
    masks = torch.tensor([[[[1.0, -1.0]], [[-1.0, -2.0]], [[3.0, 3.0]]]])
    hidden = background(masks, (1, 2))
    assert hidden.tolist() == [[[False, True], [False, False], [False, False]]]
    # Resized before it is cut: of two pixels that differ, the mean decides.
    assert background(masks, (1, 1)).tolist() == [[[False], [False], [False]]]
    pair = torch.tensor([[[[1.0, -2.0], [1.0, 1.0]]]])
    assert background(pair, (2, 1)).tolist() == [[[True, False]]]


def test_queries_see_only_their_masks() -> None:
    # With all pixels but one hidden from a query, the others' features cannot move it.
    layer = small().transformer_decoder.layers[0].eval()
    x, positions = torch.randn(1, 1, 16), torch.randn(1, 16)
    memory = torch.randn(1, 4, 16)
    hidden = torch.tensor([[[True, False, True, True]]])
    other = memory.clone()
    other[:, [0, 2, 3]] += 1
    nowhere = torch.zeros(4, 16)
    out = layer(x, positions, memory, nowhere, hidden)
    assert torch.equal(out, layer(x, positions, other, nowhere, hidden))
    other[:, 1] += 1
    assert not torch.allclose(out, layer(x, positions, other, nowhere, hidden))


def test_learns_two_halves() -> None:
    # Left and right differ in the features; forty steps are enough to tell them apart.
    decoder = small(classes=2)
    text = torch.randn(1, 2, 7)
    half = torch.tensor([-1.0] * 8 + [1.0] * 8).expand(1, 6, 16, 16)
    features = [F.avg_pool2d(half, 2**i) for i in range(4)]
    labels = torch.tensor([0] * 8 + [1] * 8).expand(1, 16, 16)
    optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        losses = decoder.loss(decoder(features, text), labels)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    decoder.eval()
    prediction = decoder.semantic_logits(decoder(features, text), (16, 16)).argmax(1)
    assert (prediction == labels).float().mean() > 0.95


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"width 60 is not a multiple of 32 \(norm_groups\)"):
        TextMask2FormerSpec(width=60, heads=4)
    with pytest.raises(ValidationError, match=r"width 64 is not a multiple of 5 \(heads\)"):
        TextMask2FormerSpec(width=64, heads=5)
    with pytest.raises(MFuserError, match="4 pyramid levels, not 3"):
        TextMask2FormerSpec(**MASK_DECODER).build((8, 8, 8), 5, 7)
    with pytest.raises(MFuserError, match="class queries"):
        small()(pyramid((8, 8), (4, 4), (2, 2), (1, 1)))


def test_size_of_the_released_decoder() -> None:
    with torch.device("meta"):
        decoder = TextMask2FormerSpec().build((2048,) * 4, 19, 768)
    assert len(decoder.state_dict()) == 336
    assert sum(p.numel() for p in decoder.parameters()) == 26_766_292
