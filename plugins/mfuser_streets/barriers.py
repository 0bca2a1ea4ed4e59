"""Walls and fences along a line from a near to a far place."""

from __future__ import annotations

import math

import numpy as np

from mfuser_streets.buildings import Ground, front_normal
from mfuser_streets.geometry import Painter, Point, Thing


def wall(rng: np.random.Generator, near: Ground, far: Ground, side: int, height: float) -> Thing:
    """A masonry wall with courses and a cap."""
    draw = rng.random(3)
    normal = front_normal(near, far, side)
    courses = rng.random() < 0.7
    thick = 0.35
    length = math.hypot(far[0] - near[0], far[1] - near[1])
    end_normal = -(far[0] - near[0]) / length, 0.0, -(far[1] - near[1]) / length
    end = near[0] - normal[0] * thick, near[1] - normal[2] * thick

    def band(a: Ground, b: Ground, y0: float, y1: float) -> list[Point]:
        return [(a[0], y0, a[1]), (a[0], y1, a[1]), (b[0], y1, b[1]), (b[0], y0, b[1])]

    def paint(p: Painter) -> None:
        for b, n in ((end, end_normal), (far, normal)):
            p.face("stone", band(near, b, 0, height), n, draw)
            if courses:
                part = p.part("course", (near[0], 0, near[1]), n, draw)
                p.polygons(
                    part, [band(near, b, y, y + 0.05) for y in np.arange(0.35, height - 0.2, 0.4)]
                )
            p.face("cap", band(near, b, height - 0.14, height + 0.04), n, draw)

    def shade(p: Painter) -> None:
        p.cast_shadow([near, far, end], height)

    xs, zs = (near[0], far[0], end[0]), (near[1], far[1], end[1])
    return Thing(min(xs), max(xs), min(zs), max(zs), paint, shade)


def fence(
    rng: np.random.Generator, near: Ground, far: Ground, side: int, height: float, sort: str
) -> Thing:
    """Wooden "boards", a "lattice" of bars, or a "guardrail"."""
    draw = rng.random(3)
    normal = front_normal(near, far, side)
    dx, dz = far[0] - near[0], far[1] - near[1]
    length = math.hypot(dx, dz)

    def strip(t0: float, t1: float, y0: float, y1: float) -> list[Point]:
        xa, za, xb, zb = near[0] + t0 * dx, near[1] + t0 * dz, near[0] + t1 * dx, near[1] + t1 * dz
        return [(xa, y0, za), (xa, y1, za), (xb, y1, zb), (xb, y0, zb)]

    def paint(p: Painter) -> None:
        start = (near[0], 0.0, near[1])
        if sort == "guardrail":
            part = p.part("guardrail", start, normal, draw)
            shade_part = p.part("guardrail", start, normal, draw, 0.72)
            posts = np.arange(0.0, length, 2.0) / length
            p.polygons(shade_part, [strip(t, t + 0.14 / length, 0, 0.75) for t in posts])
            p.polygon(part, strip(0, 1, 0.42, 0.82))
            p.polygon(shade_part, strip(0, 1, 0.58, 0.66))
            return
        gap, step = (0.93, 0.16) if sort == "boards" else (0.5, 0.13)
        near_share = min(1.0, 26.0 / length)  # further off the bars run together
        count = int(near_share * length / step)
        part = p.part(sort, start, normal, draw)
        dark = p.part(sort, start, normal, draw, 0.78)
        if sort == "boards":
            p.polygon(dark, strip(0, 1, 0.05, height))
        elif near_share < 1:
            p.polygon(dark, strip(near_share, 1, 0.05, height))
        step_t = near_share / count
        left = np.arange(0, count, 1 if sort == "lattice" else 2) * step_t
        right = left + gap * step_t
        t = np.stack([left, left, right, right], 1)
        up = np.broadcast_to([0.04, height, height, 0.04], t.shape)
        p.polygons(part, np.stack([near[0] + t * dx, up, near[1] + t * dz], 2))
        for y in (0.12, 0.5, 0.88):
            p.polygon(
                part if sort == "lattice" else dark,
                strip(0, 1, y * height - 0.04, y * height + 0.04),
            )

    def shade(p: Painter) -> None:
        p.cast_shadow([near, far], height * (0.5 if sort == "guardrail" else 0.9))

    return Thing(
        min(near[0], far[0]),
        max(near[0], far[0]),
        min(near[1], far[1]),
        max(near[1], far[1]),
        paint,
        shade,
    )
