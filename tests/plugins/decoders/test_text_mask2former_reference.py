"""The whole decoder against its equations, written out for one image in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser_plugins.decoders.text_mask2former import TextMask2FormerSpec

HEADS, POINTS, GROUPS = 2, 2, 4
Params = dict[str, Tensor]


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(p: Params, name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def feed_forward(p: Params, name: str, x: Tensor) -> Tensor:
    return linear(p, f"{name}.layers.1", linear(p, f"{name}.layers.0.0", x).clamp(min=0))


def attend(p: Params, name: str, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q (Q, D), k and v (N, D), seen (Q, N), bool."""
    weights, biases = (p[f"{name}.attn.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
    q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True))
    heads = []
    for qh, kh, vh in zip(*(x.chunk(HEADS, 1) for x in (q, k, v)), strict=True):
        scores = (qh @ kh.T / qh.shape[1] ** 0.5).exp() * seen
        heads.append(scores / scores.sum(1, keepdim=True) @ vh)
    return linear(p, f"{name}.attn.out_proj", torch.cat(heads, 1))


def conv_norm(p: Params, name: str, x: Tensor) -> Tensor:
    """(C, h, w) -> (D, h, w)"""
    weight = p[f"{name}.conv.weight"]
    x = F.conv2d(x[None], weight, p.get(f"{name}.conv.bias"), padding=weight.shape[-1] // 2)[0]
    x = torch.cat([(g - g.mean()) / (g.var(correction=0) + 1e-5).sqrt() for g in x.chunk(GROUPS)])
    return x * p[f"{name}.gn.weight"][:, None, None] + p[f"{name}.gn.bias"][:, None, None]


def resize(x: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(x[None], shape, mode="bilinear", align_corners=False)[0]


def sines(h: int, w: int, width: int) -> Tensor:
    """(h * w, width): y first, sine and cosine in turn."""
    rows = []
    for y in range(h):
        for x in range(w):
            row = []
            for place, length in ((y, h), (x, w)):
                for i in range(width // 4):
                    angle = (place + 1) / (length + 1e-6) * 2 * math.pi / 10_000 ** (4 * i / width)
                    row += [math.sin(angle), math.cos(angle)]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def look(p: Params, name: str, q: Tensor, v: Tensor, at: Tensor, maps: list) -> Tensor:
    """Deformable attention: q and v (N, D), at (N, 2), maps of (h, w)."""
    v = linear(p, f"{name}.value_proj", v)
    split = (len(q), HEADS, len(maps), POINTS)
    offsets = linear(p, f"{name}.sampling_offsets", q).view(*split, 2)
    weights = linear(p, f"{name}.attention_weights", q).view(len(q), HEADS, -1).softmax(-1)
    weights = weights.view(split)
    heads = []
    for head, values in enumerate(v.chunk(HEADS, 1)):
        out = torch.zeros_like(values)
        for level, (image, (h, w)) in enumerate(
            zip(values.split([h * w for h, w in maps]), maps, strict=True)
        ):
            # Bilinear weights of every pixel of the map at every sampled place.
            x = at[:, None, 0] * w - 0.5 + offsets[:, head, level, :, 0]  # (N, points)
            y = at[:, None, 1] * h - 0.5 + offsets[:, head, level, :, 1]
            near_x = (1 - (x[..., None] - torch.arange(w)).abs()).clamp(min=0)
            near_y = (1 - (y[..., None] - torch.arange(h)).abs()).clamp(min=0)
            near = (near_y[..., :, None] * near_x[..., None, :]).flatten(2)  # (N, points, h * w)
            out = out + (weights[:, head, level, :, None] * (near @ image)).sum(1)
        heads.append(out)
    return linear(p, f"{name}.output_proj", torch.cat(heads, 1))


def decode(p: Params, pyramid: list[Tensor], text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """pyramid (C, h, w) each, text (K, C) -> masks (K, h, w) and classes (K, K + 1), in turn."""
    levels = [conv_norm(p, f"pixel_decoder.input_convs.{i}", pyramid[3 - i]) for i in range(3)]
    maps = [tuple(level.shape[1:]) for level in levels]
    x = torch.cat([level.flatten(1).T for level in levels])
    pos = torch.cat(
        [
            sines(h, w, x.shape[1]) + p["pixel_decoder.level_encoding.weight"][i]
            for i, (h, w) in enumerate(maps)
        ]
    )
    at = torch.tensor(
        [((j + 0.5) / w, (i + 0.5) / h) for h, w in maps for i in range(h) for j in range(w)],
        dtype=torch.float64,
    )
    words = linear(p, "pixel_decoder.text_proj", text)
    keys = words + p["pixel_decoder.text_pos_embed.weight"]
    everything = torch.ones(len(x), len(words))
    for i in range(2):
        name = f"pixel_decoder.encoder.layers.{i}"
        x = norm(p, f"{name}.norms.0", x + look(p, f"{name}.attentions.0", x + pos, x, at, maps))
        read = attend(p, f"{name}.attentions.1", x + pos, keys, words, everything)
        x = norm(p, f"{name}.norms.1", x + read)
        x = norm(p, f"{name}.norms.2", x + feed_forward(p, f"{name}.ffns.0", x))
    tokens = norm(p, "pixel_decoder.encoder.post_norm", x).split([h * w for h, w in maps])
    fine = conv_norm(p, "pixel_decoder.lateral_convs.0", pyramid[0])
    fine = fine + resize(tokens[2].T.unflatten(1, maps[2]), tuple(fine.shape[1:]))
    fine = conv_norm(p, "pixel_decoder.output_convs.0", fine).clamp(min=0)
    weight, bias = p["pixel_decoder.mask_feature.weight"], p["pixel_decoder.mask_feature.bias"]
    feature = torch.einsum("ed,dhw->ehw", weight[:, :, 0, 0], fine) + bias[:, None, None]

    def predict(q: Tensor) -> tuple[Tensor, Tensor]:
        q = norm(p, "transformer_decoder.post_norm", q)
        mask = linear(p, "mask_embed.2", linear(p, "mask_embed.0", q).clamp(min=0)).clamp(min=0)
        mask = linear(p, "mask_embed.4", mask)
        return torch.einsum("qd,dhw->qhw", mask, feature), linear(p, "cls_embed", q)

    q = linear(p, "text_proj.2", linear(p, "text_proj.0", text).clamp(min=0))
    own = p["query_embed.weight"]
    out = [predict(q)]
    for i in range(4):
        level = i % 3
        memory = tokens[level] + p["level_embed.weight"][level]
        seen = resize(out[-1][0], maps[level]).flatten(1).sigmoid() >= 0.5
        seen[~seen.any(1)] = True
        name = f"transformer_decoder.layers.{i}"
        keys = memory + sines(*maps[level], q.shape[1])
        q = norm(
            p,
            f"{name}.norms.0",
            q + attend(p, f"{name}.attentions.0", q + own, keys, memory, seen),
        )
        everyone = torch.ones(len(q), len(q))
        talk = attend(p, f"{name}.attentions.1", q + own, q + own, q, everyone)
        q = norm(p, f"{name}.norms.1", q + talk)
        q = norm(p, f"{name}.norms.2", q + feed_forward(p, f"{name}.ffns.0", q))
        out.append(predict(q))
    return out


def test_equals_the_equations() -> None:
    spec = TextMask2FormerSpec(
        width=8,
        heads=HEADS,
        points=POINTS,
        pixel_layers=2,
        pixel_ffn=12,
        layers=4,
        ffn=10,
        norm_groups=GROUPS,
    )
    decoder = spec.build((6, 5, 4, 3), 3, 7).double()
    torch.manual_seed(23)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    sizes = ((9, 7), (5, 4), (2, 3), (1, 2))
    pyramid = [torch.randn(2, 6 - i, *s).double() for i, s in enumerate(sizes)]
    text = torch.randn(2, 3, 7).double()
    with torch.no_grad():
        output = decoder(pyramid, text)
        # Neither all seen nor all hidden, or the masked attention would not be put to the test.
        hidden = (torch.stack(output.masks) < 0).double().mean()
        assert 0.2 < hidden < 0.8
        for b in range(2):
            want = decode(dict(decoder.named_parameters()), [x[b] for x in pyramid], text[b])
            assert len(want) == len(output.masks) == 5
            for i, (masks, classes) in enumerate(want):
                assert (output.masks[i][b] - masks).abs().max() < 1e-9 * masks.abs().max()
                assert (output.classes[i][b] - classes).abs().max() < 1e-9 * classes.abs().max()
