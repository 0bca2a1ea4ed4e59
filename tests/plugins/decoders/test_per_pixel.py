"""The decoders that classify pixels: against their papers' equations, with and without text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from mfuser import MFuserError, components

CHANNELS = (5, 6, 7, 8)
SIZES = ((12, 20), (6, 10), (3, 5), (2, 3))
CLASSES, TEXT = 4, 9
LEARNED = ("mlp", "upernet", "segmenter")
FROM_TEXT = tuple(f"text_{name}" for name in LEARNED)


def build(name: str, **options: Any) -> nn.Module:
    spec = components("decoder")[name]
    made = spec(**{**spec.tiny, "dropout": 0.0, **options})
    return made.build(CHANNELS, CLASSES, TEXT if name in FROM_TEXT else None)  # type: ignore[no-any-return,attr-defined]


def pyramid(batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, c, *size) for c, size in zip(CHANNELS, SIZES, strict=True)]


def up(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("name", [*LEARNED, *FROM_TEXT])
@pytest.mark.parametrize("batch", [1, 2])
def test_trains_and_every_parameter_learns(name: str, batch: int) -> None:
    """One crop alone as well: pooled maps of 1x1 have no batch statistics."""
    decoder = build(name).train()
    levels, text = pyramid(batch), torch.randn(batch, CLASSES, TEXT)
    labels = torch.randint(0, CLASSES, (1, 6, 10)).repeat(batch, 1, 1)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :5] = 255
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    found = []
    for _ in range(20):
        loss = decoder.loss(decoder(levels, text), labels)["loss_ce"]
        optimizer.zero_grad()
        loss.backward()
        for parameter, value in decoder.named_parameters():
            assert value.grad is not None and value.grad.isfinite().all(), parameter
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    assert decoder.semantic_logits(decoder(levels, text), (33, 47)).shape == (
        batch,
        CLASSES,
        33,
        47,
    )
    ignored = decoder.loss(decoder(levels, text), torch.full_like(labels, 255))["loss_ce"]
    assert ignored == 0


@pytest.mark.parametrize("name", LEARNED)
def test_no_text_is_read(name: str) -> None:
    decoder, levels = build(name).eval(), pyramid()
    with torch.no_grad():
        first = decoder(levels).masks[-1]
        assert torch.equal(first, decoder(levels, torch.randn(2, CLASSES, TEXT)).masks[-1])


@pytest.mark.parametrize("name", FROM_TEXT)
def test_classes_follow_their_texts(name: str) -> None:
    """Texts in another order give maps in that order: nothing else tells the classes apart."""
    decoder, levels, text = build(name).eval(), pyramid(), torch.randn(2, CLASSES, TEXT)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        maps, moved = decoder(levels, text).masks[-1], decoder(levels, text[:, order]).masks[-1]
    assert torch.allclose(moved, maps[:, order], atol=1e-5)
    assert not torch.allclose(moved, maps, atol=1e-2)
    with pytest.raises(MFuserError, match=f"{name} takes class queries from text"):
        decoder(levels)


ANY_TEXT = {"text_mlp": True, "text_upernet": True, "text_segmenter": False, "mlp": False}


@pytest.mark.parametrize(("name", "any_text"), ANY_TEXT.items())
def test_which_answer_for_any_texts(name: str, any_text: bool) -> None:
    decoder = build(name).eval()
    assert decoder.open_vocabulary is any_text
    if any_text:
        text = torch.randn(2, CLASSES + 3, TEXT)
        levels = pyramid()
        with torch.no_grad():
            maps, fewer = decoder(levels, text).masks[-1], decoder(levels, text[:, 2:4]).masks[-1]
        assert torch.allclose(maps[:, 2:4], fewer, atol=1e-5)


def test_mlp_is_eq_4_of_segformer() -> None:
    decoder, levels = build("mlp").eval(), pyramid()
    norm = decoder.mix[1]
    for value in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.no_grad():
        parts = [
            up(torch.einsum("bchw,dc->bdhw", x, p.weight[..., 0, 0]) + p.bias[:, None, None],
               SIZES[0])
            for x, p in zip(levels, decoder.project, strict=True)
        ]  # fmt: skip
        x = torch.einsum("bchw,dc->bdhw", torch.cat(parts, 1), decoder.mix[0].weight[..., 0, 0])
        mean, var, weight, bias = (
            getattr(norm, n)[:, None, None]
            for n in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)
        wanted = decoder.classify.conv(x)
        assert torch.allclose(decoder(levels).masks[-1], wanted, atol=1e-5)


def test_text_mlp_is_a_cosine() -> None:
    decoder, levels = build("text_mlp", temperature=0.5).eval(), pyramid()
    text = torch.randn(2, CLASSES, TEXT)
    mixed: list[Tensor] = []
    decoder.classify.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    with torch.no_grad():
        maps = decoder(levels, text).masks[-1]
        pixels = decoder.classify.project(mixed[0])
        for k in range(CLASSES):
            wanted = F.cosine_similarity(pixels, text[:, k, :, None, None], dim=1) / 0.5
            assert torch.allclose(maps[:, k], wanted, atol=1e-5)
    assert maps.abs().max() <= 2 + 1e-5


def test_upernet_level_by_level() -> None:
    """The order of levels, by weights that tell them apart: each block names its input."""
    decoder, levels = build("upernet").eval(), pyramid()
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, i, o, name=name: seen.append((name, tuple(o.shape[-2:])))
            )
    with torch.no_grad():
        decoder(levels)
    assert seen == [
        *((f"pool.reduce.{i}.0", (side, side)) for i, side in enumerate((1, 2, 3, 6))),
        ("pool.mix.0", SIZES[3]),
        *((f"lateral.{i}.0", SIZES[i]) for i in (2, 1, 0)),
        *((f"smooth.{i}.0", SIZES[i]) for i in (2, 1, 0)),
        ("mix.0", SIZES[0]),
        ("classify.conv", SIZES[0]),
    ]


def test_pooling_is_the_mean_over_parts() -> None:
    """PSPNet's figure 3, on a level whose sides the bins divide."""
    spec = components("decoder")["upernet"]
    decoder = spec(width=8, norm_groups=2, bins=(1, 2)).build((3,) * 4, CLASSES, None)  # type: ignore[attr-defined]
    x, pool = torch.randn(1, 3, 4, 6), decoder.pool
    whole = x.mean((2, 3), keepdim=True)
    quarters = x.unflatten(3, (2, 3)).unflatten(2, (2, 2)).mean((3, 5))
    with torch.no_grad():
        parts = [x, up(pool.reduce[0](whole), (4, 6)), up(pool.reduce[1](quarters), (4, 6))]
        assert torch.allclose(pool(x), pool.mix(torch.cat(parts, 1)), atol=1e-6)


def test_segmenter_masks_are_normalized_cosines() -> None:
    """Without layers: section 3.2's scalar product of patches and classes, norm over classes."""
    decoder, levels = build("segmenter").eval(), pyramid()
    decoder.layers = nn.ModuleList()
    with torch.no_grad():
        patches = sum(
            up(project(level), SIZES[2])
            for project, level in zip(decoder.project, levels, strict=True)
        )
        patches = decoder.patches(decoder.norm(patches.permute(0, 2, 3, 1)))  # type: ignore[union-attr]
        classes = decoder.classes(decoder.norm(decoder.embeddings))
        cosines = torch.stack([F.cosine_similarity(patches, c, dim=-1) for c in classes], -1)
        wanted = (cosines - cosines.mean(-1, keepdim=True)) / (
            cosines.var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        assert torch.allclose(decoder(levels).masks[-1], wanted.permute(0, 3, 1, 2), atol=1e-4)
    with pytest.raises(ValidationError, match="width 30 is not a multiple of heads 4"):
        components("decoder")["segmenter"](width=30, heads=4)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="width 30 is not a multiple of norm_groups 32"):
        components("decoder")["text_upernet"](width=30)  # type: ignore[call-arg]
