"""Houses: facades with windows, shops and doors, gables, roofs."""

from __future__ import annotations

import math

import numpy as np

from mfuser_streets.chance import one_of
from mfuser_streets.geometry import Painter, Point, Thing, Vector

Ground = tuple[float, float]
"""A place on the ground, (x, z) in meters."""


def front_normal(near: Ground, far: Ground, side: int) -> Vector:
    """Unit normal of the upright plane over near-far, toward the road."""
    dx, dz = far[0] - near[0], far[1] - near[1]
    n = math.hypot(dx, dz)
    return -side * dz / n, 0.0, side * dx / n


def building(
    rng: np.random.Generator, near: Ground, far: Ground, side: int, height: float
) -> Thing:
    """A house: facade to the road, gable end to the camera, windows, shop or door, roof."""
    wall, trim, roof, shop = rng.random((4, 3))
    story = rng.uniform(2.9, 3.5)
    stories = max(1, int(height / story))
    height = stories * story + 0.5
    look = one_of(rng, ("punched", "punched", "ribbon", "tall"))
    gabled = stories <= 4 and rng.random() < 0.55
    shops = rng.random() < 0.45
    awning = shops and rng.random() < 0.6
    pitch = rng.uniform(1.5, 3.0)
    length = math.hypot(far[0] - near[0], far[1] - near[1])
    columns = max(2, round(length / rng.uniform(2.2, 3.2)))
    depth = rng.uniform(8, 13)
    lit = rng.random((3, 3))
    normal = front_normal(near, far, side)
    back = -normal[0] * depth, -normal[2] * depth
    along = ((far[0] - near[0]) / length, (far[1] - near[1]) / length)
    end = near[0] + back[0], near[1] + back[1]
    share = {"punched": 0.5, "ribbon": 0.88, "tall": 0.42}[look]
    low, high = {"punched": (0.3, 0.8), "ribbon": (0.32, 0.78), "tall": (0.16, 0.86)}[look]

    def paint(p: Painter) -> None:
        end_normal = (-along[0], 0.0, -along[1])
        for origin, target, count, n in (
            (near, end, max(2, columns * 2 // 3), end_normal),
            (near, far, columns, normal),
        ):
            _facade(p, origin, target, count, n)
        if gabled:
            _gable(p)
        else:
            _cornice(p, end, end_normal)
            _cornice(p, far, normal)

    def _facade(p: Painter, a: Ground, b: Ground, count: int, n: Vector) -> None:
        if not p.faces_camera((a[0], 1.0, a[1]), n):
            return
        dx, dz = b[0] - a[0], b[1] - a[1]

        def quad(t0: float, t1: float, y0: float, y1: float) -> list[Point]:
            xa, za, xb, zb = a[0] + t0 * dx, a[1] + t0 * dz, a[0] + t1 * dx, a[1] + t1 * dz
            return [(xa, y0, za), (xa, y1, za), (xb, y1, zb), (xb, y0, zb)]

        p.face("facade", quad(0, 1, 0, height), n, wall)
        base = quad(0, 1, 0, 0.5)
        p.face("trim", base, n, trim, 0.85)
        distance = max(min(a[1], b[1]), 1.0)
        if distance > 75:
            return
        first = 1 if shops else 0
        floor = np.repeat(np.arange(first, stories), count)
        column = np.tile(np.arange(count), max(0, stories - first))
        middle, y = (column + 0.5) / count, floor * story
        half = share / 2 / count

        def grid(t0: np.ndarray, t1: np.ndarray, y0: np.ndarray, y1: np.ndarray) -> np.ndarray:
            """Upright quads (n, 4, 3) on the facade."""
            quads = np.empty((len(t0), 4, 3))
            quads[:, :2, 0], quads[:, 2:, 0] = (a[0] + t0 * dx)[:, None], (a[0] + t1 * dx)[:, None]
            quads[:, :2, 2], quads[:, 2:, 2] = (a[1] + t0 * dz)[:, None], (a[1] + t1 * dz)[:, None]
            quads[:, ::3, 1], quads[:, 1:3, 1] = y0[:, None], y1[:, None]
            return quads

        if distance < 40 and look != "ribbon":
            m = 1.12 * half
            frames = grid(middle - m, middle + m, y + low * story - 0.12, y + high * story + 0.1)
            p.polygons(p.part("trim", base[0], n, trim), frames)
        panes = grid(middle - half, middle + half, y + low * story, y + high * story)
        group = (floor * 7 + column * 5 + floor * column) % 3
        for i in range(3):
            p.polygons(p.part("glass", base[0], n, lit[i]), panes[group == i])
        if look == "punched" and distance < 30:
            bar = 0.01 / count
            bars = grid(middle - bar, middle + bar, y + low * story, y + high * story)
            p.polygons(p.part("trim", base[0], n, trim), bars)
        if shops:
            windows = [quad((i + 0.08) / count, (i + 0.92) / count, 0.5, 2.4) for i in range(count)]
            p.polygons(p.part("shop", base[0], n, shop), windows[::2] + windows[1::3])
            p.face("awning", quad(0.02, 0.98, 2.5, 3.0), n, shop)
            if awning:
                lip = [
                    (x + n[0] * 0.9, y, z + n[2] * 0.9) for x, y, z in quad(0.04, 0.96, 2.2, 2.5)
                ]
                top = quad(0.04, 0.96, 2.2, 2.85)
                p.polygon(p.part("awning", base[0], n, shop, 0.9), [lip[1], top[1], top[2], lip[2]])
        else:
            t = 0.5 / count if count < 3 else 1.5 / count
            p.face("door", quad(t - 0.2 / count, t + 0.2 / count, 0, 2.2), n, shop)

    def _cornice(p: Painter, b: Ground, n: Vector) -> None:
        if p.faces_camera((near[0], 1.0, near[1]), n):
            low_edge = height - 0.35
            p.face(
                "trim",
                [
                    (near[0], low_edge, near[1]),
                    (near[0], height + 0.1, near[1]),
                    (b[0], height + 0.1, b[1]),
                    (b[0], low_edge, b[1]),
                ],
                n,
                trim,
            )

    def _gable(p: Painter) -> None:
        ridge = near[0] + back[0] / 2, near[1] + back[1] / 2
        far_ridge = far[0] + back[0] / 2, far[1] + back[1] / 2
        top = height + pitch
        p.face(
            "facade",
            [(near[0], height, near[1]), (ridge[0], top, ridge[1]), (end[0], height, end[1])],
            (-along[0], 0.0, -along[1]),
            wall,
        )
        slope = math.hypot(pitch, depth / 2)
        k = pitch / slope
        n = normal[0] * k, depth / 2 / slope, normal[2] * k
        eaves = near[0] + normal[0] * 0.4, near[1] + normal[2] * 0.4
        far_eaves = far[0] + normal[0] * 0.4, far[1] + normal[2] * 0.4
        quad = [
            (eaves[0], height - 0.2, eaves[1]),
            (ridge[0], top, ridge[1]),
            (far_ridge[0], top, far_ridge[1]),
            (far_eaves[0], height - 0.2, far_eaves[1]),
        ]
        if p.faces_camera(quad[0], n):
            p.face("roof", quad, n, roof)

    far_end = far[0] + back[0], far[1] + back[1]
    footprint = [near, far, far_end, end]

    def shade(p: Painter) -> None:
        p.cast_shadow(footprint, height)

    xs, zs = [c[0] for c in footprint], [c[1] for c in footprint]
    return Thing(min(xs), max(xs), min(zs), max(zs), paint, shade)
