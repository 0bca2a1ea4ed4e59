"""The released models in plain float64, from docs/parity.md's description, on their own key names.

No code is shared with the project but the decoder, which has its own references. State dicts are
random, at reduced width, in the layout of the released files.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

NAMES = ("road", "sidewalk", "building", "vegetation", "sky")
DEPTH, HEADS, CLASSES, SLOTS = 4, 4, len(NAMES), 5
VOCABULARY = 64
START, END = VOCABULARY - 2, VOCABULARY - 1
SIZES = {
    "eva": {"image": 56, "patch": 14, "vfm": 64, "vlm": 64, "text": 48, "joint": 40, "context": 8},
    "clip": {"image": 64, "patch": 16, "vfm": 48, "vlm": 64, "text": 48, "joint": 40, "context": 5},
    "siglip": {
        "image": 64, "patch": 16, "vfm": 64, "vlm": 64, "text": 64, "joint": 64, "context": 5
    },
}  # fmt: skip
EVA_HIDDEN, SIGLIP_HIDDEN, ENHANCER, DECODER = 170, 96, 32, 32

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def spec(kind: str, **changes: Any) -> dict[str, Any]:
    """A pairing for the reduced state dicts: the released options, the sizes from here."""
    s = SIZES[kind]
    text = {
        "width": s["text"], "heads": HEADS, "layers": 2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    if kind == "eva":
        trunk = {"embed_dim": s["vlm"], "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.6667}
        vlm = {
            "model": "EVA02-L-14-336",
            "options": {"embed_dim": s["joint"], "vision_cfg": {"timm_model_kwargs": trunk}},
        }
    elif kind == "clip":
        tower = {"width": s["vlm"], "layers": DEPTH, "head_width": s["vlm"] // HEADS}
        vlm = {
            "model": "ViT-L-14-336-quickgelu",
            "patch_size": 16,
            "class_embeddings": 2,
            "drop_path": 0.1,
            "options": {"embed_dim": s["joint"], "vision_cfg": tower},
        }
    else:
        ratio = SIGLIP_HIDDEN / s["vlm"]
        trunk = {"embed_dim": s["vlm"], "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": ratio}
        vlm = {
            "model": "ViT-L-16-SigLIP-384",
            "tanh_gelu": True,
            "options": {"embed_dim": s["joint"], "vision_cfg": {"timm_model_kwargs": trunk}},
        }
        text["mlp_ratio"] = ratio
    vlm["options"]["text_cfg"] = text
    table = {
        "vfm": {
            "name": "timm",
            "model": "vit_large_patch14_dinov2",
            "weights": "random",
            "patch_size": s["patch"],
            "options": {"embed_dim": s["vfm"], "depth": DEPTH, "num_heads": HEADS},
        },
        "vlm": {
            "name": "open_clip",
            "weights": "random",
            "context_length": SLOTS + s["context"],
            **vlm,
        },
        "fusion": {"name": "mvfuser", "project": True if kind == "clip" else None},
        "merge": {"vfm_norm": kind != "clip", "project": True if kind == "clip" else None},
        "enhancer": {"name": "mtenhancer", "width": ENHANCER},
        "decoder": {
            "name": "text_mask2former", "width": DECODER, "pixel_layers": 2, "pixel_ffn": 48,
            "layers": 3, "ffn": 64, "num_points": 50,
        },
        "image_size": s["image"],
        "classes": list(NAMES),
        "prompt": {"context": s["context"], "slots": SLOTS, "ids": class_ids(kind).tolist()},
    }  # fmt: skip
    return {**table, **changes}


def class_ids(kind: str) -> Tensor:
    """[start, words, end, padding]; SigLIP has no start token, and its last slot is read."""
    rng = torch.Generator().manual_seed(5)
    ids = torch.zeros(CLASSES, SLOTS, dtype=torch.long)
    for k in range(CLASSES):
        words = torch.randint(1, START, (1 + k % 3,), generator=rng).tolist()
        row = [*words, 1] if kind == "siglip" else [START, *words, END]
        ids[k, : len(row)] = torch.tensor(row)
    return ids


# ------------------------------------------------------------------ random state dicts


def state(kind: str, seed: int = 0) -> State:
    """A state dict of a released kind at reduced width, float32, every parameter at work."""
    rng = torch.Generator().manual_seed(seed)
    found: State = {}

    def put(name: str, *shape: int, scale: float | None = None, center: float = 0.0) -> None:
        scale = (1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1) if scale is None else scale
        found[name] = center + scale * torch.randn(*shape, generator=rng)

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        put(f"{name}.weight", out, into)
        if bias:
            put(f"{name}.bias", out)

    def norm(name: str, width: int, bias: bool = True) -> None:
        put(f"{name}.weight", width, center=1.0)
        if bias:
            put(f"{name}.bias", width)

    def fuser(name: str, width: int, states: int = 16) -> None:
        half, rank = width // 2, math.ceil(width / 16)
        put(f"{name}.A_log", half, states, scale=0.3, center=0.5)
        put(f"{name}.D", half, scale=0.5)
        found[f"{name}.scale"] = torch.tensor(0.5)
        linear(f"{name}.in_proj", width, width, bias=False)
        linear(f"{name}.x_proj", rank + 2 * states, half, bias=False)
        linear(f"{name}.dt_proj", half, rank)
        linear(f"{name}.out_proj", width, half, bias=False)
        put(f"{name}.conv1d_x.weight", half, 1, 3, scale=0.5)
        put(f"{name}.conv1d_z.weight", half, 1, 3, scale=0.5)
        norm(f"{name}.norm", half, bias=False)

    def open_clip_block(name: str, width: int) -> None:
        put(f"{name}.attn.in_proj_weight", 3 * width, width)
        put(f"{name}.attn.in_proj_bias", 3 * width)
        linear(f"{name}.attn.out_proj", width, width)
        norm(f"{name}.ln_1", width)
        norm(f"{name}.ln_2", width)
        linear(f"{name}.mlp.c_fc", 4 * width, width)
        linear(f"{name}.mlp.c_proj", width, 4 * width)

    def siglip_block(name: str, width: int, hidden: int) -> None:
        for which in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{name}.self_attn.{which}", width, width)
        norm(f"{name}.layer_norm1", width)
        norm(f"{name}.layer_norm2", width)
        linear(f"{name}.mlp.fc1", hidden, width)
        linear(f"{name}.mlp.fc2", width, hidden)

    s = SIZES[kind]
    width, joint, text, patch = s["vlm"], s["joint"], s["text"], s["patch"]
    tokens = (s["image"] // patch) ** 2
    length = SLOTS + s["context"]
    put("contexts", 1, s["context"], text, scale=1.0)
    put("gamma", joint, scale=0.5)
    if kind == "eva":
        put("random_text", CLASSES, joint)
        put("backbone.cls_token", 1, 1, width)
        put("backbone.pos_embed", 1, tokens + 1, width, scale=0.3)
        put("backbone.patch_embed.proj.weight", width, 3, patch, patch, scale=0.04)
        put("backbone.patch_embed.proj.bias", width)
        put("backbone.rope.freqs_cos", tokens, width // HEADS)
        put("backbone.rope.freqs_sin", tokens, width // HEADS)
        for i in range(DEPTH):
            name = f"backbone.blocks.{i}"
            put(f"{name}.attn.rope.freqs_cos", tokens, width // HEADS)
            put(f"{name}.attn.rope.freqs_sin", tokens, width // HEADS)
            norm(f"{name}.norm1", width)
            norm(f"{name}.norm2", width)
            for which in ("q_proj", "k_proj", "v_proj"):
                linear(f"{name}.attn.{which}", width, width, bias=False)
            put(f"{name}.attn.q_bias", width)
            put(f"{name}.attn.v_bias", width)
            norm(f"{name}.attn.inner_attn_ln", width)
            linear(f"{name}.attn.proj", width, width)
            linear(f"{name}.mlp.w1", EVA_HIDDEN, width)
            linear(f"{name}.mlp.w2", EVA_HIDDEN, width)
            norm(f"{name}.mlp.ffn_ln", EVA_HIDDEN)
            linear(f"{name}.mlp.w3", width, EVA_HIDDEN)
        norm("backbone.norm", width)
        linear("backbone.head", joint, width)
    elif kind == "clip":
        put("backbone.class_embedding", width, scale=0.5)
        put("backbone.positional_embedding", tokens + 1, width, scale=0.3)
        put("backbone.conv1.weight", width, 3, patch, patch, scale=0.04)
        norm("backbone.ln_pre", width)
        for i in range(DEPTH):
            open_clip_block(f"backbone.transformer.resblocks.{i}", width)
        norm("backbone.ln_post", width)
        put("backbone.proj", width, joint)
    else:
        put("backbone.embeddings.patch_embedding.weight", width, 3, patch, patch, scale=0.04)
        put("backbone.embeddings.patch_embedding.bias", width)
        put("backbone.embeddings.position_embedding.weight", tokens, width, scale=0.3)
        for i in range(DEPTH):
            siglip_block(f"backbone.encoder.layers.{i}", width, SIGLIP_HIDDEN)
        norm("backbone.post_layernorm", width)
        put("backbone.head.probe", 1, 1, width)
        put("backbone.head.attention.in_proj_weight", 3 * width, width)
        put("backbone.head.attention.in_proj_bias", 3 * width)
        linear("backbone.head.attention.out_proj", width, width)
        norm("backbone.head.layernorm", width)
        linear("backbone.head.mlp.fc1", SIGLIP_HIDDEN, width)
        linear("backbone.head.mlp.fc2", width, SIGLIP_HIDDEN)
    if kind == "siglip":
        put("text_encoder.embeddings.token_embedding.weight", VOCABULARY, text, scale=1.0)
        put("text_encoder.embeddings.position_embedding.weight", length, text, scale=0.3)
        for i in range(2):
            siglip_block(f"text_encoder.encoder.layers.{i}", text, SIGLIP_HIDDEN)
        norm("text_encoder.final_layer_norm", text)
        linear("text_encoder.head", joint, text)
    else:
        put("text_encoder.token_embedding.weight", VOCABULARY, text, scale=1.0)
        put("text_encoder.positional_embedding", length, text, scale=0.3)
        for i in range(2):
            open_clip_block(f"text_encoder.transformer.resblocks.{i}", text)
        norm("text_encoder.ln_final", text)
        put("text_encoder.text_projection", text, joint)

    vfm = s["vfm"]
    put("backbone.dinov2.cls_token", 1, 1, vfm)
    put("backbone.dinov2.pos_embed", 1, tokens + 1, vfm, scale=0.3)
    put("backbone.dinov2.mask_token", 1, vfm)
    put("backbone.dinov2.patch_embed.proj.weight", vfm, 3, patch, patch, scale=0.04)
    put("backbone.dinov2.patch_embed.proj.bias", vfm)
    for i in range(DEPTH):
        name = f"backbone.dinov2.blocks.{i}"
        norm(f"{name}.norm1", vfm)
        norm(f"{name}.norm2", vfm)
        linear(f"{name}.attn.qkv", 3 * vfm, vfm)
        linear(f"{name}.attn.proj", vfm, vfm)
        linear(f"{name}.mlp.fc1", 4 * vfm, vfm)
        linear(f"{name}.mlp.fc2", vfm, 4 * vfm)
        put(f"{name}.ls1.gamma", vfm, center=0.5)
        put(f"{name}.ls2.gamma", vfm, center=0.5)
        fuser(f"backbone.adapter.{i}", width)
        if kind != "eva":
            linear(f"backbone.adapter_proj1.{i}", width, vfm)
            linear(f"backbone.adapter_proj2.{i}", vfm, width)
    if kind != "eva":
        linear("backbone.adapter_proj3", width, vfm)
    norm("backbone.dinov2.norm", vfm)

    both = vfm + width
    for name in ("fpn1.0", "fpn1.3", "fpn2.0"):
        put(f"backbone.{name}.weight", both, both, 2, 2, scale=1 / math.sqrt(both))
        put(f"backbone.{name}.bias", both)
    norm("backbone.fpn1.1", both)
    put("backbone.fpn1.1.running_mean", both)
    found["backbone.fpn1.1.running_var"] = torch.rand(both, generator=rng) + 0.5
    found["backbone.fpn1.1.num_batches_tracked"] = torch.tensor(7)

    memory = "context_decoder.memory_proj"
    norm(f"{memory}.0", joint)
    linear(f"{memory}.1", ENHANCER, joint)
    norm(f"{memory}.2", ENHANCER)
    norm("context_decoder.text_proj.0", joint)
    linear("context_decoder.text_proj.1", ENHANCER, joint)
    layer = "context_decoder.decoder.0"
    for which in ("q_proj", "k_proj", "v_proj"):
        linear(f"{layer}.self_attn.{which}", ENHANCER, ENHANCER, bias=False)
    linear(f"{layer}.self_attn.proj", ENHANCER, ENHANCER)
    fuser(f"{layer}.cross_attn", ENHANCER)
    for i in (1, 2, 3):
        norm(f"{layer}.norm{i}", ENHANCER)
    linear(f"{layer}.mlp.0", 4 * ENHANCER, ENHANCER)
    linear(f"{layer}.mlp.3", ENHANCER, 4 * ENHANCER)
    norm("context_decoder.out_proj.0", ENHANCER)
    linear("context_decoder.out_proj.1", joint, ENHANCER)

    for name, tensor in decoder(both, joint).state_dict().items():
        noise = torch.randn(tensor.shape, generator=rng)
        found[f"decode_head.{name}"] = tensor + 0.1 * noise
    return found


def decoder(channels: int, joint: int) -> torch.nn.Module:
    """The decoder alone is the project's: its names are the released ones, and it has references
    of its own."""
    from mfuser_plugins.decoders.text_mask2former import TextMask2FormerSpec

    torch.manual_seed(0)
    # PyTorch's start, whose convolutions have biases that parity can see.
    spec = TextMask2FormerSpec(
        width=DECODER, pixel_layers=2, pixel_ffn=48, layers=3, ffn=64, init="pytorch"
    )
    return spec.build((channels,) * 4, CLASSES, joint).eval()


# ------------------------------------------------------------------ forward, float64


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
