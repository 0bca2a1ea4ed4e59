"""Random fields that every picture takes a stretch of."""

from __future__ import annotations

import functools

import cv2
import numpy as np

BANK = 512
WHITE = 1 << 21


@functools.cache
def noise_bank() -> tuple[np.ndarray, np.ndarray]:
    """Tiles of noise, (512, 512), mean 0 and deviation 1, periodic: grain, and clouds."""
    rng = np.random.default_rng(20)
    grain = np.zeros((BANK, BANK), np.float32)
    clouds = np.zeros((BANK, BANK), np.float32)
    for field, octaves in (
        (grain, ((1, 0.7), (2, 0.8), (5, 0.7), (14, 0.5), (60, 0.35))),
        (clouds, ((6, 0.12), (14, 0.3), (32, 0.6), (70, 1.0))),
    ):
        for scale, weight in octaves:
            raw = rng.standard_normal((BANK, BANK)).astype(np.float32)
            smooth = cv2.GaussianBlur(np.tile(raw, (3, 3)), (0, 0), scale * 0.6)
            layer = smooth[BANK : 2 * BANK, BANK : 2 * BANK]
            field += weight * layer / layer.std()
        field -= field.mean()
        field /= field.std()
    return grain, clouds


@functools.cache
def _white_noise() -> np.ndarray:
    """A long row of normal numbers; any stretch of it serves as one image's sensor noise."""
    return np.random.default_rng(21).standard_normal(WHITE, dtype=np.float32)


def tile(bank: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A periodic tile at float32 places (H, W)."""
    return cv2.remap(bank, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def white(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """float32 normal numbers."""
    n = int(np.prod(shape))
    if n > WHITE // 2:
        return rng.standard_normal(shape, dtype=np.float32)
    start = int(rng.integers(0, WHITE - n))
    return _white_noise()[start : start + n].reshape(shape)
