"""The models that are pretrained and what they are pretrained on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_streets import towers
from mfuser_streets.pretrain.batches import (
    CROP,
    DEPTHS,
    EDGES,
    GRID,
    PATCH,
    Captioned,
    Pairs,
)
from mfuser_streets.pretrain.recipe import Recipe
from mfuser_streets.world.captions import CLASSES

_JOINT = 64
_TEMPERATURE = 0.08
_SAMPLES = 1024
"""Patches a batch that are contrasted with one another."""
PROMPT = "a photo of a {}"


def prepare(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) with the towers' statistics."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(s)[:, None, None] for s in (towers.MEAN, towers.STD))
    return (x - mean) / std


def start(vit: Any) -> None:
    """Weights to begin with: smallish linear layers, sines as positions. In place."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.05)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        vit.pos_embed.copy_(0.3 * sines(*GRID, vit.embed_dim)[None])


def sines(h: int, w: int, width: int) -> Tensor:
    """(h * w, width): sines and cosines of row and column."""
    rates = 1.5 / 40 ** (torch.arange(width // 4) / (width // 4))

    def waves(n: int) -> Tensor:
        angle = torch.arange(n)[:, None] * rates
        return torch.cat([angle.sin(), angle.cos()], 1)

    rows = waves(h)[:, None].expand(h, w, width // 2)
    columns = waves(w)[None].expand(h, w, width // 2)
    return torch.cat([rows, columns], -1).reshape(h * w, width)


def tokens(
    vit: Any, images: Tensor, place: tuple[int, int], hidden: Tensor | None, mask: Tensor | None
) -> Tensor:
    """(B, 3, h * 8, w * 8) -> normed tokens (B, h * w, D), positions from `place` in the table.

    hidden: bool (B, h * w), patches replaced by `mask` (D,).
    """
    x = vit.patch_embed(images)
    if hidden is not None and mask is not None:
        x = torch.where(hidden[..., None], mask.to(x.dtype), x)
    h, w = images.shape[2] // PATCH, images.shape[3] // PATCH
    table = vit.pos_embed.reshape(*GRID, -1)
    rows = table[place[0] : place[0] + h, place[1] : place[1] + w]
    x = x + rows.reshape(1, h * w, -1)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


class ImageLosses(nn.Module):
    """Heads that a tower is pretrained with on pictures alone; none of them is kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.joint = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, _JOINT))
        self.pixels = nn.Linear(width, 3 * PATCH * PATCH)
        self.geometry = nn.Linear(width, DEPTHS + EDGES)
        self.mask = nn.Parameter(torch.zeros(width))

    def forward(self, vit: Any, batch: Pairs, recipe: Recipe) -> dict[str, Tensor]:
        """Losses by name, each with its weight."""
        images = [prepare(batch.first), prepare(batch.second)]
        hidden = torch.from_numpy(batch.masks)
        seen = [
            tokens(vit, x, place, mask, self.mask)
            for x, place, mask in zip(images, batch.places, hidden, strict=True)
        ]
        losses: dict[str, Tensor] = {}
        if recipe.contrast:
            losses["contrast"] = recipe.contrast * self._contrast(seen, batch)
        if recipe.masked:
            terms = [self._masked(*t) for t in zip(seen, images, hidden, strict=True)]
            losses["masked"] = recipe.masked * (terms[0] + terms[1]) / 2
        if recipe.geometry:
            losses["geometry"] = recipe.geometry * self._geometry(seen[0], batch)
        return losses

    def _contrast(self, seen: list[Tensor], batch: Pairs) -> Tensor:
        """InfoNCE (van den Oord et al. 2018) between patches at the same place of a scene."""
        h, w = CROP
        dy, dx = batch.shift
        a, b = (
            F.normalize(self.joint(x).float(), dim=-1).unflatten(1, CROP).flip(2)
            if flipped
            else F.normalize(self.joint(x).float(), dim=-1).unflatten(1, CROP)
            for x, flipped in zip(seen, batch.mirrored, strict=True)
        )
        # Patch (i, j) of the first crop is patch (i - dy, j - dx) of the second.
        y0, y1, x0, x1 = max(0, dy), min(h, h + dy), max(0, dx), min(w, w + dx)
        a = a[:, y0:y1, x0:x1].reshape(-1, _JOINT)
        b = b[:, y0 - dy : y1 - dy, x0 - dx : x1 - dx].reshape(-1, _JOINT)
        chosen = torch.randperm(len(a))[:_SAMPLES]
        similarity = a[chosen] @ b[chosen].t() / _TEMPERATURE
        same = torch.arange(len(chosen))
        return (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.t(), same)) / 2

    def _masked(self, seen: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error of hidden patches' pixels, each patch normalized (He et al. 2022)."""
        pixels = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        mean, spread = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True)
        error = ((self.pixels(seen).float() - (pixels - mean) / (spread + 0.05).sqrt()) ** 2).mean(
            -1
        )
        return (error * hidden).sum() / hidden.sum()

    def _geometry(self, seen: Tensor, batch: Pairs) -> Tensor:
        found, true = self.geometry(seen).float(), torch.from_numpy(batch.geometry)
        depth = F.smooth_l1_loss(found[..., :DEPTHS], true[..., :DEPTHS])
        edge = F.binary_cross_entropy_with_logits(found[..., DEPTHS:], true[..., DEPTHS:])
        return 4 * depth + edge


class WordLosses(nn.Module):
    """Ties pictures to words: captions to crops, and class words to patches."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.full((len(CLASSES),), -1.0))
        self.tokenizer, self.length = tokenizer, context_length
        self.prompts = tokenizer([PROMPT.format(c) for c in CLASSES], context_length)

    def forward(self, clip: Any, batch: Captioned, recipe: Recipe) -> dict[str, Tensor]:
        """Losses by name, each with its weight."""
        dense = tokens(clip.visual.trunk, prepare(batch.images), batch.place, None, None)
        dense = clip.visual.head(dense).float()
        image = F.normalize(dense.mean(1), dim=-1)
        text = F.normalize(
            clip.encode_text(self.tokenizer(batch.texts, self.length)).float(), dim=-1
        )
        similarity = image @ text.t() * clip.logit_scale.exp().clamp(max=50)
        same = torch.arange(len(image))
        losses = {
            "captions": (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.t(), same))
            / 2
        }
        if recipe.words:
            words = F.normalize(clip.encode_text(self.prompts).float(), dim=-1)
            maps = F.normalize(dense, dim=-1) @ words.t() * self.scale.exp()  # (B, N, classes)
            found = torch.logsumexp(maps, 1) - math.log(maps.shape[1]) + self.bias
            tags = torch.from_numpy(batch.tags)
            loss = F.binary_cross_entropy_with_logits(found, tags) * len(CLASSES)
            losses["words"] = recipe.words * loss
        return losses
