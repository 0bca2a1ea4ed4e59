"""Shared by decoders that classify each pixel: loss, scores, and two kinds of classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser import IGNORE, Decoder, DecoderOutput, MFuserError, whole_batch
from mfuser.model.sliding_window import at_least_float32


class PerPixelDecoder(Decoder):
    """A decoder whose last prediction holds one map of logits per class, at any resolution."""

    def loss(self, output: DecoderOutput, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy at the labels' resolution, mean over labeled pixels; 0 without any."""
        logits = self.semantic_logits(output, (labels.shape[-2], labels.shape[-1]))
        valid = (labels != IGNORE).sum()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return {"loss_ce": loss / valid.clamp(min=1) * whole_batch.share(valid)}

    def semantic_logits(self, output: DecoderOutput, size: tuple[int, int]) -> Tensor:
        masks = at_least_float32(output.masks[-1])
        return F.interpolate(masks, size, mode="bilinear", align_corners=False)


class ConvClassifier(nn.Module):
    """A learned weight vector and bias per class."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """(B, D, h, w) -> logits (B, K, h, w); class queries are ignored."""
        return self.conv(x)


class TextClassifier(nn.Module):
    """Cosine similarity to the class texts over a temperature (LSeg, arXiv 2201.03546, eq. 1-2).

    Pixels are projected to the texts' width. Nothing is learned per class.
    """

    def __init__(self, width: int, text_dim: int, temperature: float, name: str) -> None:
        super().__init__()
        self.project = nn.Conv2d(width, text_dim, 1)
        self.temperature = temperature
        self.name = name

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """(B, D, h, w), class queries (B, K, C) -> logits (B, K, h, w)."""
        text = given(queries, self.name)
        pixels = F.normalize(self.project(x), dim=1)
        similarity = torch.einsum("bchw,bkc->bkhw", pixels, F.normalize(text, dim=-1))
        return similarity / self.temperature


def given(queries: Tensor | None, name: str) -> Tensor:
    """The class queries. Raises MFuserError naming the decoder where there are none."""
    if queries is None:
        raise MFuserError(f"{name} takes class queries from text, and got none")
    return queries


def resized(levels: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """Maps (B, D_i, h_i, w_i) -> the same at one size, bilinearly."""
    return [
        level
        if level.shape[-2:] == size
        else F.interpolate(level, size, mode="bilinear", align_corners=False)
        for level in levels
    ]
