"""The feature pyramid: four taps of one grid become strides 4, 8, 16 and 32."""

from __future__ import annotations

from torch import Tensor, nn


class Pyramid(nn.Module):
    """x4, x2, x1 and /2, after ViT-Det's simple pyramid (Li et al. 2022), as released.

    With a patch size of 16 these are strides 4, 8, 16 and 32; other patch sizes shift them all.
    """

    def __init__(self, channels: int, width: int | None = None) -> None:
        super().__init__()
        out = width or channels
        self.project = nn.ModuleList(
            [nn.Conv2d(channels, out, 1) if width else nn.Identity() for _ in range(4)]
        )
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(out, out, 2, stride=2),
            nn.BatchNorm2d(out),
            nn.GELU(),
            nn.ConvTranspose2d(out, out, 2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(out, out, 2, stride=2))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(2, stride=2)
        self.channels = (out,) * 4

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        """Four (B, D, h, w) -> (B, D', 4h, 4w), (B, D', 2h, 2w), (B, D', h, w), (B, D', h/2, w/2)."""
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [
            level(project(tap))
            for tap, project, level in zip(taps, self.project, levels, strict=True)
        ]
