"""The released models in plain float64, from docs/parity.md's description, on their own key names.

No code is shared with the project but the decoder, which has its own references. The state dicts
are those of tests/helpers/released_states.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from released_states import (  # the tests reach the rest through this module
    DEPTH,
    HEADS,
    NAMES,
    SIZES,
    State,
    class_ids,
    decoder,
    spec,
    state,
)
from torch import Tensor

__all__ = ["NAMES", "SIZES", "Released", "class_ids", "spec", "state"]

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class Released:
    """A released model of a kind: `run` returns what it computes on the way, by name.

    p: its parameters in float64; ask them for gradients before `run` to have some.
    """

    def __init__(self, kind: str, tensors: State, image: int | None = None) -> None:
        self.kind, self.s = kind, {**SIZES[kind], "image": image or SIZES[kind]["image"]}
        self.p = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        split = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
        logits = split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1])
        if causal:
            logits = logits + torch.full_like(logits[0, 0], -math.inf).triu(1)
        return (logits.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)

    def patches(self, name: str, images: Tensor, statistics: str) -> Tensor:
        mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in STATISTICS[statistics])
        kernel = self.p[f"{name}.weight"]
        x = F.conv2d((images - mean) / std, kernel, self.p.get(f"{name}.bias"), kernel.shape[-1])
        return x.flatten(2).transpose(1, 2)

    # DINOv2

    def dino_embed(self, images: Tensor) -> Tensor:
        x = self.patches("backbone.dinov2.patch_embed.proj", images, "imagenet")
        first = self.p["backbone.dinov2.cls_token"].expand(len(x), -1, -1)
        return torch.cat([first, x], 1) + self.p["backbone.dinov2.pos_embed"]

    def dino_block(self, i: int, x: Tensor) -> Tensor:
        name = f"backbone.dinov2.blocks.{i}"
        q, k, v = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x, 1e-6)).chunk(3, -1)
        y = self.linear(f"{name}.attn.proj", self.attend(q, k, v))
        x = x + y * self.p[f"{name}.ls1.gamma"]
        y = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, 1e-6)))
        return x + self.linear(f"{name}.mlp.fc2", y) * self.p[f"{name}.ls2.gamma"]

    # vision-language towers

    def vlm_embed(self, images: Tensor) -> Tensor:
        if self.kind == "eva":
            x = self.patches("backbone.patch_embed.proj", images, "clip")
            first = self.p["backbone.cls_token"].expand(len(x), -1, -1)
            return torch.cat([first, x], 1) + self.p["backbone.pos_embed"]
        if self.kind == "siglip":
            x = self.patches("backbone.embeddings.patch_embedding", images, "half")
            return x + self.p["backbone.embeddings.position_embedding.weight"]
        x = self.patches("backbone.conv1", images, "clip")
        cls = self.p["backbone.class_embedding"]
        positions = self.p["backbone.positional_embedding"].clone()
        positions[0] += cls  # a second time
        x = torch.cat([cls.expand(len(x), 1, -1), x], 1) + positions
        return self.norm("backbone.ln_pre", x, 1e-5)

    def vlm_block(self, i: int, x: Tensor) -> Tensor:
        if self.kind == "clip":
            return self.clip_block(f"backbone.transformer.resblocks.{i}", x, quick=True)
        if self.kind == "siglip":
            return self.siglip_block(f"backbone.encoder.layers.{i}", x)
        return self.eva_block(f"backbone.blocks.{i}", x)

    def clip_block(self, name: str, x: Tensor, quick: bool, causal: bool = False) -> Tensor:
        w, b = self.p[f"{name}.attn.in_proj_weight"], self.p[f"{name}.attn.in_proj_bias"]
        q, k, v = F.linear(self.norm(f"{name}.ln_1", x, 1e-5), w, b).chunk(3, -1)
        x = x + self.linear(f"{name}.attn.out_proj", self.attend(q, k, v, causal))
        y = self.linear(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", x, 1e-5))
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
        return x + self.linear(f"{name}.mlp.c_proj", y)

    def siglip_block(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.layer_norm1", x, 1e-6)
        q, k, v = (self.linear(f"{name}.self_attn.{n}_proj", y) for n in "qkv")
        x = x + self.linear(f"{name}.self_attn.out_proj", self.attend(q, k, v))
        y = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.layer_norm2", x, 1e-6))
        return x + self.linear(f"{name}.mlp.fc2", F.gelu(y, approximate="tanh"))

    def eva_block(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.norm1", x, 1e-6)
        q = self.linear(f"{name}.attn.q_proj", y) + self.p[f"{name}.attn.q_bias"]
        k = self.linear(f"{name}.attn.k_proj", y)
        v = self.linear(f"{name}.attn.v_proj", y) + self.p[f"{name}.attn.v_bias"]
        y = self.attend(self.rotate(q), self.rotate(k), v)
        x = x + self.linear(f"{name}.attn.proj", self.norm(f"{name}.attn.inner_attn_ln", y, 1e-6))
        y = self.norm(f"{name}.norm2", x, 1e-6)
        y = F.silu(self.linear(f"{name}.mlp.w1", y)) * self.linear(f"{name}.mlp.w2", y)
        return x + self.linear(f"{name}.mlp.w3", self.norm(f"{name}.mlp.ffn_ln", y, 1e-6))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions on patches: half of each head turns with y, half with x."""
        side = self.s["image"] // self.s["patch"]
        place = torch.arange(side).double() / side * 16
        head = x.shape[-1] // HEADS
        wave = 10_000 ** (-torch.arange(0, head // 2, 2).double() / (head // 2))
        y_angle = (place[:, None] * wave)[:, None].expand(side, side, -1)
        x_angle = (place[:, None] * wave)[None].expand(side, side, -1)
        angle = torch.cat([y_angle, x_angle], -1).flatten(0, 1)  # (T, head / 2)
        pairs = x[:, 1:].unflatten(-1, (HEADS, head // 2, 2))
        a, b = pairs[..., 0], pairs[..., 1]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)
        return torch.cat([x[:, :1], turned], 1)

    # fusion

    def fuse(self, name: str, tokens: Tensor) -> Tensor:
        x, z = self.linear(f"{name}.in_proj", tokens).chunk(2, -1)
        x, z = (
            F.silu(
                F.conv1d(
                    t.transpose(1, 2),
                    self.p[f"{name}.conv1d_{n}.weight"],
                    padding=1,
                    groups=t.shape[-1],
                ).transpose(1, 2)
            )
            for n, t in (("x", x), ("z", z))
        )
        states = self.p[f"{name}.A_log"].shape[1]
        rank = self.p[f"{name}.dt_proj.weight"].shape[1]
        dt, b, c = self.linear(f"{name}.x_proj", x).split([rank, states, states], -1)
        dt = F.softplus(self.linear(f"{name}.dt_proj", dt) + self.p[f"{name}.dt_proj.bias"])
        rate = -self.p[f"{name}.A_log"].exp()
        h = x.new_zeros(len(x), x.shape[-1], states)
        out = []
        for t in range(x.shape[1]):
            h = (dt[:, t, :, None] * rate).exp() * h
            h = h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            out.append((h * c[:, t, None]).sum(-1) + self.p[f"{name}.D"] * x[:, t])
        y = torch.stack(out, 1)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.p[f"{name}.norm.weight"]
        return self.linear(f"{name}.out_proj", y * F.silu(z)) * self.p[f"{name}.scale"]

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Taps (B, D, h, w), and tokens in the joint space, global first."""
        vfm, vlm = self.dino_embed(images), self.vlm_embed(images)
        side = self.s["image"] // self.s["patch"]
        prefix = 0 if self.kind == "siglip" else 1
        taps = []
        for i in range(DEPTH):
            vfm, vlm = self.dino_block(i, vfm), self.vlm_block(i, vlm)
            mapped = self.kind == "clip"
            given = self.linear(f"backbone.adapter_proj1.{i}", vfm) if mapped else vfm
            offset = self.fuse(f"backbone.adapter.{i}", torch.cat([given, vlm], 1))
            of_vfm, of_vlm = offset[:, : vfm.shape[1]], offset[:, vfm.shape[1] :]
            vfm = vfm + (self.linear(f"backbone.adapter_proj2.{i}", of_vfm) if mapped else of_vfm)
            vlm = vlm + of_vlm
            both = torch.cat([vfm[:, 1:], vlm[:, prefix:]], -1)
            taps.append(both.transpose(1, 2).unflatten(2, (side, side)))
        return taps, self.embed(vfm, vlm)

    def embed(self, vfm: Tensor, vlm: Tensor) -> Tensor:
        if self.kind == "clip":
            x = vlm + self.linear("backbone.adapter_proj3", vfm)
            return self.norm("backbone.ln_post", x, 1e-5) @ self.p["backbone.proj"]
        vfm = self.norm("backbone.dinov2.norm", vfm, 1e-6)
        if self.kind == "eva":
            return self.linear("backbone.head", self.norm("backbone.norm", vlm, 1e-6) + vfm)
        x = self.norm("backbone.post_layernorm", vlm, 1e-6) + vfm[:, 1:]
        queries = torch.cat([self.p["backbone.head.probe"].expand(len(x), -1, -1), x], 1)
        name = "backbone.head"
        w, b = (self.p[f"{name}.attention.in_proj_{n}"].chunk(3) for n in ("weight", "bias"))
        q, k, v = F.linear(queries, w[0], b[0]), F.linear(x, w[1], b[1]), F.linear(x, w[2], b[2])
        y = self.linear(f"{name}.attention.out_proj", self.attend(q, k, v))
        z = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.layernorm", y, 1e-6))
        return y + self.linear(f"{name}.mlp.fc2", F.gelu(z, approximate="tanh"))

    # text

    def text(self, ids: Tensor) -> Tensor:
        siglip = self.kind == "siglip"
        table = "embeddings.token_embedding" if siglip else "token_embedding"
        x = self.p[f"text_encoder.{table}.weight"][ids]
        contexts = self.p["contexts"].expand(len(ids), -1, -1)
        x = torch.cat([x[:, :1], contexts, x[:, 1:]], 1)
        if siglip:
            x = x + self.p["text_encoder.embeddings.position_embedding.weight"]
            for i in range(2):
                x = self.siglip_block(f"text_encoder.encoder.layers.{i}", x)
            x = self.norm("text_encoder.final_layer_norm", x, 1e-6)
            return self.linear("text_encoder.head", x[:, -1])
        x = x + self.p["text_encoder.positional_embedding"]
        for i in range(2):
            name = f"text_encoder.transformer.resblocks.{i}"
            x = self.clip_block(name, x, quick=self.kind == "clip", causal=True)
        x = self.norm("text_encoder.ln_final", x, 1e-5)
        end = ids.argmax(-1) + contexts.shape[1]
        return x[torch.arange(len(ids)), end] @ self.p["text_encoder.text_projection"]

    def enhance(self, text: Tensor, visual: Tensor) -> Tensor:
        name, k = "context_decoder", text.shape[1]
        v = self.linear(f"{name}.memory_proj.1", self.norm(f"{name}.memory_proj.0", visual, 1e-5))
        v = self.norm(f"{name}.memory_proj.2", v, 1e-5)
        x = self.linear(f"{name}.text_proj.1", self.norm(f"{name}.text_proj.0", text, 1e-5))
        layer = f"{name}.decoder.0"
        y = self.norm(f"{layer}.norm1", x, 1e-5)
        q, key, value = (self.linear(f"{layer}.self_attn.{n}_proj", y) for n in "qkv")
        x = x + self.linear(f"{layer}.self_attn.proj", self.attend(q, key, value))
        copy = self.norm(f"{layer}.norm2", x, 1e-5)
        y = self.fuse(f"{layer}.cross_attn", torch.cat([copy, v, copy], 1))
        x = x + y[:, :k] + y[:, -k:]
        y = F.gelu(self.linear(f"{layer}.mlp.0", self.norm(f"{layer}.norm3", x, 1e-5)))
        x = x + self.linear(f"{layer}.mlp.3", y)
        out = self.linear(f"{name}.out_proj.1", self.norm(f"{name}.out_proj.0", x, 1e-5))
        return text + self.p["gamma"] * out

    # the rest

    def pyramid(self, taps: list[Tensor]) -> list[Tensor]:
        def up(name: str, x: Tensor) -> Tensor:
            weight, bias = self.p[f"backbone.{name}.weight"], self.p[f"backbone.{name}.bias"]
            return F.conv_transpose2d(x, weight, bias, stride=2)

        x = up("fpn1.0", taps[0])
        mean, var, weight, bias = (
            self.p[f"backbone.fpn1.1.{n}"].view(1, -1, 1, 1)
            for n in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.gelu((x - mean) / (var + 1e-5).sqrt() * weight + bias)
        return [up("fpn1.3", x), up("fpn2.0", taps[1]), taps[2], F.max_pool2d(taps[3], 2)]

    def run(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W) in [0, 1], float64."""
        taps, visual = self.encode(images)
        raw = self.text(ids)
        text = self.enhance(raw.expand(len(images), -1, -1), visual)
        self.head: Any = decoder(taps[0].shape[1], visual.shape[-1]).double()
        own = {k[len("decode_head.") :]: v for k, v in self.p.items() if "decode_head." in k}
        levels = self.pyramid(taps)
        self.output: Any = torch.func.functional_call(self.head, own, (levels, text))
        side = self.s["image"] // self.s["patch"]
        cosine = F.cosine_similarity(text[:, :, None], visual[:, None, 1:], dim=-1)
        scores = self.head.semantic_logits(self.output, images.shape[-2:])
        return {
            "text_raw": raw,
            "text": text,
            "visual": visual,
            "alignment": cosine.unflatten(-1, (side, side)),
            "scores": scores,
            **{f"level{i}": level for i, level in enumerate(levels)},
            **{f"mask{i}": m for i, m in enumerate(self.output.masks)},
            **{f"class{i}": c for i, c in enumerate(self.output.classes)},
        }
