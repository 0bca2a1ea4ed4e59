"""Base of decoders that classify each pixel: cross-entropy, and logits at any size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mfuser import IGNORE, Decoder, DecoderOutput


class PerPixelDecoder(Decoder):
    """One map of class logits (B, K, h, w), in `masks`."""

    def loss(self, output: DecoderOutput, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, mean over labeled pixels."""
        logits = self.semantic_logits(output, (labels.shape[-2], labels.shape[-1]))
        valid = (labels != IGNORE).sum().clamp(min=1)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return {"loss_ce": loss / valid}

    def semantic_logits(self, output: DecoderOutput, size: tuple[int, int]) -> Tensor:
        return F.interpolate(output.masks[-1], size, mode="bilinear", align_corners=False)
