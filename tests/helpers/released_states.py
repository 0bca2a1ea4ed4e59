"""State dicts in the layout of the released files: random, at reduced width."""

from __future__ import annotations

import math
from typing import Any

import torch
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
