"""The feature pyramid: four taps of one grid become strides 4, 8, 16 and 32."""

from __future__ import annotations

import math

from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """x4, x2, x1 and /2 of a grid of 16-pixel patches, after ViTDet's simple pyramid (Li et al.
    2022), as released; other patch sizes get the powers of two nearest to the same strides.

    With patches of 14 pixels the factors are those of 16, and the strides 3.5, 7, 14, 28.

    trained: by transposed convolutions and pooling; else bilinear.
    """

    def __init__(
        self, channels: int, width: int | None = None, patch: float = 16, trained: bool = True
    ) -> None:
        super().__init__()
        out = width or channels
        self.project = nn.ModuleList(
            [nn.Conv2d(channels, out, 1) if width else nn.Identity() for _ in STRIDES]
        )
        first = round(math.log2(patch / STRIDES[0]))
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = (
            _rescale(out, first - level) if trained else _resize(first - level)
            for level in range(len(STRIDES))
        )
        self.channels = (out,) * len(STRIDES)

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        """Four (B, D, h, w) -> the same at strides 4, 8, 16, 32, each (B, D', ., .)."""
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [
            level(project(tap))
            for tap, project, level in zip(taps, self.project, levels, strict=True)
        ]


def _resize(doublings: int) -> nn.Module:
    if doublings == 0:
        return nn.Identity()
    return nn.Upsample(scale_factor=2.0**doublings, mode="bilinear", align_corners=False)


def _rescale(width: int, doublings: int) -> nn.Module:
    """Up by transposed convolutions with normalization between them, down by max-pooling."""
    if doublings == 0:
        return nn.Identity()
    if doublings < 0:
        return nn.MaxPool2d(2**-doublings)
    steps: list[nn.Module] = [nn.ConvTranspose2d(width, width, 2, stride=2)]
    for _ in range(doublings - 1):
        steps += [
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        ]
    return nn.Sequential(*steps)
