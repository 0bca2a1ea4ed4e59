"""Trees, bushes and hedges: clumps of leaves, dark below and light above."""

from __future__ import annotations

import math

import numpy as np

from mfuser_streets.buildings import Ground
from mfuser_streets.geometry import Painter, Thing

_ROUND = np.exp(2j * np.pi * np.arange(14) / 14)


def tree(rng: np.random.Generator, x: float, z: float, height: float, sort: str) -> Thing:
    """A "round", "tall" or "conifer" tree, or a "bush"."""
    draw = rng.random(3)
    sun_side = rng.uniform(-0.2, 0.2)
    trunk = {"round": 0.42, "tall": 0.25, "conifer": 0.15, "bush": 0.0}[sort] * height
    width = {"round": 0.36, "tall": 0.17, "conifer": 0.24, "bush": 0.62}[sort] * height
    count = {"round": 16, "tall": 14, "conifer": 16, "bush": 9}[sort]
    chance = rng.random((count, 4))
    level = (np.arange(count) + chance[:, 0]) / count
    if sort == "conifer":
        reach = width * (1.02 - level) + 0.12
        size = 0.62 * reach + 0.18
    else:
        reach = width * np.sqrt(np.maximum(0.0, 1 - (1.9 * level - 0.95) ** 2))
        size = width * (0.38 + 0.2 * chance[:, 1] if sort != "tall" else np.full(count, 0.75))
    aside = (2 * chance[:, 2] - 1) * reach * 0.72
    above = np.maximum(trunk + (height - trunk) * (0.1 + 0.8 * level), size * 0.7)
    tone = 0.66 + 0.42 * level + 0.16 * sun_side * aside / width + 0.14 * (chance[:, 3] - 0.5)
    outline = size[:, None] * rng.uniform(0.8, 1.18, (count, 14)) * _ROUND
    upwards = np.argsort(tone)
    bloom = sort == "bush" and rng.random() < 0.25
    leaf = "needle" if sort == "conifer" else "leaf"
    spread = rng.uniform(-0.15, 0.15)

    def paint(p: Painter) -> None:
        if trunk:
            bark = p.part("bark", (x, 1, z), draw=draw)
            w = 0.05 + 0.018 * height
            fork = (x + spread, trunk * 1.1, z)
            p.limb(bark, (x, 0.0, z), fork, w * 1.25, w * 0.85)
            if sort == "round":
                for d in (-1, 1):
                    p.limb(
                        bark,
                        fork,
                        (x + d * width * 0.5, trunk + 0.35 * (height - trunk), z),
                        w * 0.6,
                        w * 0.3,
                    )
        flowers = bloom & (np.arange(count) % 4 == 3)
        sorts = ["flower" if flower else leaf for flower in flowers[upwards].tolist()]
        parts = p.leaves(sorts, (x, 1, z), draw, tone[upwards].tolist())
        shapes = outline[upwards] * np.where(flowers, 0.5, 1.0)[:, None]
        p.blobs(parts, x + aside[upwards], above[upwards], z, shapes)

    def shade(p: Painter) -> None:
        p.drop_shadow(x, trunk + 0.5 * (height - trunk), z, width)
        p.touch([(x - 0.4, z - 0.3), (x + 0.4, z - 0.3), (x + 0.4, z + 0.3), (x - 0.4, z + 0.3)])

    return Thing(x - 0.3, x + 0.3, z - 0.3, z + 0.3, paint, shade)


def hedge(rng: np.random.Generator, near: Ground, far: Ground, height: float) -> list[Thing]:
    """Bushes in a row, one every meter or so."""
    length = math.hypot(far[0] - near[0], far[1] - near[1])
    count = max(2, min(14, int(length / (0.9 * height))))
    return [
        tree(
            rng,
            near[0] + t * (far[0] - near[0]),
            near[1] + t * (far[1] - near[1]),
            height * rng.uniform(0.85, 1.1),
            "bush",
        )
        for t in np.linspace(0, 1, count)
    ]
