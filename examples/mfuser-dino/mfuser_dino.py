"""DINO's vision transformers (Caron et al., ICCV 2021) in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from mfuser import MFuserError, Stream, VisionBackbone, VisionSpec, WeightsError, hookimpl
from pydantic import Field, PositiveInt
from torch import Tensor, nn

mfuser_requires = ">=0.1,<0.2"


class Block(nn.Module):
    """Pre-norm attention and MLP; parameters are named as in the official files."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](read)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Dino(VisionBackbone):
    """A vision transformer with a class token and absolute positions, stepped block by block."""

    def __init__(self, width: int, depth: int, patch: int) -> None:
        super().__init__()
        self.embed_dim, self.depth, self.num_prefix_tokens = width, depth, 1
        self.patch_size = (patch, patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (224 // patch) ** 2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.set_statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def resize(self, image_size: tuple[int, int], patch_size: int | None = None) -> None:
        """Positions are resampled in `embed`, always from the table as loaded."""
        patch = self.patch_size[0]
        if patch_size not in (None, patch) or min(image_size) < patch:
            raise MFuserError(f"dino has patches of {patch} pixels; the image is {image_size}")
        self.image_size = (image_size[0], image_size[1])
        self.grid = (image_size[0] // patch, image_size[1] // patch)

    def embed(self, images: Tensor) -> Stream:
        if tuple(images.shape[-2:]) != self.image_size:
            raise MFuserError(f"images are {tuple(images.shape[-2:])}, not {self.image_size}")
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        table = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = self.patch_embed["proj"](images)  # (B, D, h, w)
        patches = patches + F.interpolate(table, self.grid, mode="bicubic")
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return Stream(torch.cat([cls, patches.flatten(2).transpose(1, 2)], 1), self.grid)

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.blocks[i](tokens)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.norm(tokens)


class DinoSpec(VisionSpec, name="dino"):
    """DINO's vision transformers in plain PyTorch.

    weights: an official file (dino_deitsmall16_pretrain.pth, dino_vitbase16_pretrain.pth, …), or
        "random".
    width, depth: of the transformer, with heads of 64; the defaults are ViT-S.
    patch: the patch size of the weights.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"weights": "random", "width": 64, "depth": 2}

    weights: str
    width: PositiveInt = Field(default=384, multiple_of=64)
    depth: PositiveInt = 12
    patch: Literal[8, 16] = 16

    def build(self, image_size: tuple[int, int]) -> Dino:
        """Raises WeightsError for a file that is missing or does not fit."""
        model = Dino(self.width, self.depth, self.patch)
        if self.weights != "random":
            try:
                model.load_state_dict(torch.load(self.weights, "cpu", weights_only=True))
            except (OSError, RuntimeError) as error:
                raise WeightsError(f"'{self.weights}' does not fit dino: {error}") from error
        model.requires_grad_(not self.freeze)
        model.resize(image_size, self.patch_size)
        return model.eval()


@hookimpl
def mfuser_components() -> list[type[VisionSpec]]:
    return [DinoSpec]
