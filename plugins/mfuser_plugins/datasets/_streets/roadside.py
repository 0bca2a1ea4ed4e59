"""What lines a street: buildings, trees, hedges, walls, fences, lamps, signals and signs.

Every maker takes a *front*: the two ends, near and far, of the line it stands on, (x, z) each,
and `side`, -1 left and +1 right of the road.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mfuser_plugins.datasets._streets.geometry import FACING, UP, Painter, Point, Thing, Vector

Ground = tuple[float, float]


def _normal(near: Ground, far: Ground, side: int) -> Vector:
    """Unit normal of the upright plane over near-far, towards the road."""
    dx, dz = far[0] - near[0], far[1] - near[1]
    n = math.hypot(dx, dz)
    return -side * dz / n, 0.0, side * dx / n


def building(
    rng: np.random.Generator, near: Ground, far: Ground, side: int, height: float
) -> Thing:
    """A house: facade to the road, gable end to the camera, windows, shop or door, roof."""
    wall, trim, roof, shop = rng.random((4, 3))
    storey = rng.uniform(2.9, 3.5)
    storeys = max(1, int(height / storey))
    height = storeys * storey + 0.5
    look = rng.choice(("punched", "punched", "ribbon", "tall"))
    gabled = storeys <= 4 and rng.random() < 0.55
    shops = rng.random() < 0.45
    awning = shops and rng.random() < 0.6
    pitch = rng.uniform(1.5, 3.0)
    length = math.hypot(far[0] - near[0], far[1] - near[1])
    columns = max(2, round(length / rng.uniform(2.2, 3.2)))
    depth = rng.uniform(8, 13)
    lit = rng.random((3, 3))
    normal = _normal(near, far, side)
    back = -normal[0] * depth, -normal[2] * depth
    along = ((far[0] - near[0]) / length, (far[1] - near[1]) / length)
    end = near[0] + back[0], near[1] + back[1]
    share = {"punched": 0.5, "ribbon": 0.88, "tall": 0.42}[look]
    low, high = {"punched": (0.3, 0.8), "ribbon": (0.32, 0.78), "tall": (0.16, 0.86)}[look]

    def paint(p: Painter) -> None:
        end_normal = (-along[0], 0.0, -along[1])
        for origin, target, count, n in (
            (near, end, max(2, columns * 2 // 3), end_normal), (near, far, columns, normal),
        ):  # fmt: skip
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
        frames: list[list[Point]] = []
        panes: list[list[list[Point]]] = [[], [], []]
        for floor in range(storeys):
            y = floor * storey
            if floor == 0 and shops:
                continue
            for i in range(count):
                t0, t1 = (i + 0.5 - share / 2) / count, (i + 0.5 + share / 2) / count
                group = (floor * 7 + i * 5 + floor * i) % 3
                panes[group].append(quad(t0, t1, y + low * storey, y + high * storey))
                if distance < 40 and look != "ribbon":
                    m = 0.12 * share / count
                    frames.append(quad(t0 - m, t1 + m, y + low * storey - 0.12,
                                       y + high * storey + 0.1))  # fmt: skip
        p.polygons(p.part("trim", base[0], n, trim), frames)
        for group, quads in enumerate(panes):
            p.polygons(p.part("glass", base[0], n, lit[group]), quads)
        if look == "punched" and distance < 30:
            bars = [quad((i + 0.49) / count, (i + 0.51) / count, f * storey + low * storey,
                         f * storey + high * storey)
                    for f in range(1 if shops else 0, storeys) for i in range(count)]  # fmt: skip
            p.polygons(p.part("trim", base[0], n, trim), bars)
        if shops:
            windows = [quad((i + 0.08) / count, (i + 0.92) / count, 0.5, 2.4) for i in range(count)]
            p.polygons(p.part("shop", base[0], n, shop), windows[::2] + windows[1::3])
            p.face("awning", quad(0.02, 0.98, 2.5, 3.0), n, shop)
            if awning:
                lip = [(x + n[0] * 0.9, y, z + n[2] * 0.9) for x, y, z in quad(0.04, 0.96, 2.2, 2.5)]
                top = quad(0.04, 0.96, 2.2, 2.85)
                p.polygon(p.part("awning", base[0], n, shop, 0.9),
                          [lip[1], top[1], top[2], lip[2]])  # fmt: skip
        else:
            t = 0.5 / count if count < 3 else 1.5 / count
            p.face("door", quad(t - 0.2 / count, t + 0.2 / count, 0, 2.2), n, shop)

    def _cornice(p: Painter, b: Ground, n: Vector) -> None:
        if p.faces_camera((near[0], 1.0, near[1]), n):
            low_edge = height - 0.35
            p.face("trim", [(near[0], low_edge, near[1]), (near[0], height + 0.1, near[1]),
                            (b[0], height + 0.1, b[1]), (b[0], low_edge, b[1])], n, trim)  # fmt: skip

    def _gable(p: Painter) -> None:
        ridge = near[0] + back[0] / 2, near[1] + back[1] / 2
        far_ridge = far[0] + back[0] / 2, far[1] + back[1] / 2
        top = height + pitch
        p.face("facade", [(near[0], height, near[1]), (ridge[0], top, ridge[1]),
                          (end[0], height, end[1])], (-along[0], 0.0, -along[1]), wall)  # fmt: skip
        slope = math.hypot(pitch, depth / 2)
        k = pitch / slope
        n = normal[0] * k, depth / 2 / slope, normal[2] * k
        eaves = near[0] + normal[0] * 0.4, near[1] + normal[2] * 0.4
        far_eaves = far[0] + normal[0] * 0.4, far[1] + normal[2] * 0.4
        quad = [(eaves[0], height - 0.2, eaves[1]), (ridge[0], top, ridge[1]),
                (far_ridge[0], top, far_ridge[1]), (far_eaves[0], height - 0.2, far_eaves[1])]  # fmt: skip
        if p.faces_camera(quad[0], n):
            p.face("roof", quad, n, roof)

    far_end = far[0] + back[0], far[1] + back[1]
    footprint = [near, far, far_end, end]

    def shade(p: Painter) -> None:
        p.cast_shadow(footprint, height)

    xs, zs = [c[0] for c in footprint], [c[1] for c in footprint]
    return Thing(min(xs), max(xs), min(zs), max(zs), paint, shade)


def tree(rng: np.random.Generator, x: float, z: float, height: float, sort: str) -> Thing:
    """A "round", "tall" or "conifer" tree, or a "bush"."""
    draw = rng.random(3)
    sun_side = rng.uniform(-0.2, 0.2)
    trunk = {"round": 0.42, "tall": 0.25, "conifer": 0.15, "bush": 0.0}[sort] * height
    width = {"round": 0.36, "tall": 0.17, "conifer": 0.24, "bush": 0.62}[sort] * height
    clumps: list[tuple[float, float, float, float, list[float]]] = []
    count = {"round": 16, "tall": 14, "conifer": 16, "bush": 9}[sort]
    for i in range(count):
        level = (i + rng.random()) / count
        if sort == "conifer":
            reach = width * (1.02 - level) + 0.12
            size = 0.62 * reach + 0.18
        else:
            reach = width * math.sqrt(max(0.0, 1 - (1.9 * level - 0.95) ** 2))
            size = width * rng.uniform(0.38, 0.58) if sort != "tall" else width * 0.75
        dx = rng.uniform(-1, 1) * reach * 0.72
        y = trunk + (height - trunk) * (0.1 + 0.8 * level)
        tone = 0.66 + 0.42 * level + 0.16 * sun_side * dx / width + rng.uniform(-0.07, 0.07)
        clumps.append((dx, max(y, size * 0.7), size, tone, list(rng.uniform(0.8, 1.18, 14))))
    clumps.sort(key=lambda c: c[3])
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
                    p.limb(bark, fork, (x + d * width * 0.5, trunk + 0.35 * (height - trunk), z),
                           w * 0.6, w * 0.3)  # fmt: skip
        for i, (dx, y, size, tone, shape) in enumerate(clumps):
            material = "flower" if bloom and i % 4 == 3 else leaf
            part = p.part(material, (x, 1, z), draw=draw, tone=tone)
            p.blob(part, (x + dx, y, z), size * (0.5 if material == "flower" else 1.0), shape)

    def shade(p: Painter) -> None:
        p.drop_shadow(x, trunk + 0.5 * (height - trunk), z, width)
        p.touch([(x - 0.4, z - 0.3), (x + 0.4, z - 0.3), (x + 0.4, z + 0.3), (x - 0.4, z + 0.3)])

    return Thing(x - 0.3, x + 0.3, z - 0.3, z + 0.3, paint, shade)


def hedge(rng: np.random.Generator, near: Ground, far: Ground, height: float) -> list[Thing]:
    """Bushes in a row, one every metre or so."""
    length = math.hypot(far[0] - near[0], far[1] - near[1])
    count = max(2, min(14, int(length / (0.9 * height))))
    return [
        tree(rng, near[0] + t * (far[0] - near[0]), near[1] + t * (far[1] - near[1]),
             height * rng.uniform(0.85, 1.1), "bush")
        for t in np.linspace(0, 1, count)
    ]  # fmt: skip


def wall(rng: np.random.Generator, near: Ground, far: Ground, side: int, height: float) -> Thing:
    """A masonry wall with courses and a cap."""
    draw = rng.random(3)
    normal = _normal(near, far, side)
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
                p.polygons(part, [band(near, b, y, y + 0.05)
                                  for y in np.arange(0.35, height - 0.2, 0.4)])  # fmt: skip
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
    normal = _normal(near, far, side)
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
        bars = [strip(i / count * near_share, (i + gap) / count * near_share, 0.04, height)
                for i in range(0, count)]  # fmt: skip
        p.polygons(part, bars if sort == "lattice" else bars[::2])
        for y in (0.12, 0.5, 0.88):
            p.polygon(part if sort == "lattice" else dark,
                      strip(0, 1, y * height - 0.04, y * height + 0.04))  # fmt: skip

    def shade(p: Painter) -> None:
        p.cast_shadow([near, far], height * (0.5 if sort == "guardrail" else 0.9))

    return Thing(
        min(near[0], far[0]), max(near[0], far[0]), min(near[1], far[1]), max(near[1], far[1]),
        paint, shade,
    )  # fmt: skip


def _post(p: Painter, x: float, z: float, height: float, radius: float, draw: Sequence[float],
          material: str = "metal") -> int:  # fmt: skip
    part = p.part(material, (x, 1, z), draw=draw)
    p.polygon(part, [(x - radius, 0, z), (x - radius, height, z), (x + radius, height, z),
                     (x + radius, 0, z)])  # fmt: skip
    light = p.part(material, (x, 1, z), draw=draw, tone=1.18)
    p.polygon(light, [(x - radius, 0, z), (x - radius, height, z), (x - radius * 0.3, height, z),
                      (x - radius * 0.3, 0, z)])  # fmt: skip
    return part


def _thin(x: float, z: float, paint, height: float) -> Thing:  # type: ignore[no-untyped-def]
    def shade(p: Painter) -> None:
        p.cast_shadow([(x - 0.08, z), (x + 0.08, z)], height)

    return Thing(x - 0.1, x + 0.1, z - 0.1, z + 0.1, paint, shade)


def lamp_post(rng: np.random.Generator, x: float, z: float, side: int) -> Thing:
    """A street lamp with an arm over the road, or a lantern."""
    draw = rng.random(3)
    lantern = rng.random() < 0.3
    height = rng.uniform(3.2, 4.2) if lantern else rng.uniform(6.0, 8.0)

    def paint(p: Painter) -> None:
        part = _post(p, x, z, height, 0.1, draw)
        if lantern:
            p.disc(p.part("lamp", (x, 1, z)), (x, height + 0.15, z), 0.27, 0.8)
            p.limb(part, (x - 0.2, height + 0.42, z), (x + 0.2, height + 0.42, z), 0.05, 0.05)
            return
        tip = x - side * 1.9
        p.limb(part, (x, height - 0.05, z), (x - side * 0.7, height + 0.45, z), 0.09, 0.07)
        p.limb(part, (x - side * 0.7, height + 0.45, z), (tip, height + 0.5, z), 0.07, 0.07)
        p.limb(p.part("lamp", (x, 1, z)), (tip + side * 0.35, height + 0.4, z),
               (tip - side * 0.3, height + 0.4, z), 0.13, 0.13)  # fmt: skip

    return _thin(x, z, paint, height)


def utility_pole(rng: np.random.Generator, x: float, z: float) -> Thing:
    draw = rng.random(3)
    height = rng.uniform(7, 9)

    def paint(p: Painter) -> None:
        part = _post(p, x, z, height, 0.14, draw, "timber")
        for y, w in ((height - 0.5, 1.0), (height - 1.3, 0.8)):
            p.polygon(part, [(x - w, y, z), (x - w, y + 0.14, z), (x + w, y + 0.14, z),
                             (x + w, y, z)])  # fmt: skip

    return _thin(x, z, paint, height)


def traffic_light(rng: np.random.Generator, x: float, z: float, side: int) -> Thing:
    """A signal on a post, often with a second one on an arm over the road."""
    draw = rng.random(3)
    arm = rng.random() < 0.45
    state = int(rng.choice(3, p=(0.45, 0.1, 0.45)))
    height = rng.uniform(2.9, 3.5)

    def head(p: Painter, cx: float, y: float, scale: float) -> None:
        centre = (cx, y, z)
        w, h = 0.26 * scale, 0.62 * scale
        for material, grow in (("backplate", 0.09 * scale), ("housing", 0.0)):
            part = p.part(material, centre, draw=draw)
            p.polygon(part, [(cx - w - grow, y - h - grow, z), (cx - w - grow, y + h + grow, z),
                             (cx + w + grow, y + h + grow, z), (cx + w + grow, y - h - grow, z)])  # fmt: skip
        for i, name in enumerate(("red_light", "amber_light", "green_light")):
            part = p.part(name if i == state else "dark_light", centre)
            p.disc(part, (cx, y + (1 - i) * 0.38 * scale, z), 0.165 * scale)

    def paint(p: Painter) -> None:
        top = 5.6 if arm else height
        part = _post(p, x, z, top, 0.1, draw)
        head(p, x, height - 0.2, 1.0)
        if arm:
            tip = x - side * 3.6
            p.limb(part, (x, top - 0.1, z), (tip, top + 0.1, z), 0.09, 0.07)
            head(p, tip, top - 0.15, 1.15)

    return _thin(x, z, paint, height)


def traffic_sign(rng: np.random.Generator, x: float, z: float, sort: str) -> Thing:
    """A "ban", "stop", "warning", "order", "priority", "parking" or "direction" sign on a post."""
    draw = rng.random(3)
    height = rng.uniform(2.3, 2.9)
    size = rng.uniform(0.4, 0.52)

    def regular(y: float, r: float, sides: int, turn: float) -> list[Point]:
        return [(x + r * math.sin(turn + 2 * math.pi * i / sides),
                 y + r * math.cos(turn + 2 * math.pi * i / sides), z) for i in range(sides)]  # fmt: skip

    def board(y: float, w: float, h: float) -> list[Point]:
        return [(x - w, y - h, z), (x - w, y + h, z), (x + w, y + h, z), (x + w, y - h, z)]

    def paint(p: Painter) -> None:
        def put(material: str, shape: list[Point]) -> None:
            p.face(material, shape, FACING, draw)

        top = height + (1.5 if sort == "direction" else 0.4)
        _post(p, x, z, top, 0.06, draw)
        y, r = height, size
        if sort == "ban":
            put("sign_red", regular(y, r, 16, 0))
            put("sign_white", regular(y, 0.72 * r, 16, 0))
            put("sign_black", board(y, 0.3 * r, 0.12 * r))
        elif sort == "stop":
            put("sign_red", regular(y, 1.08 * r, 8, math.pi / 8))
            put("sign_white", board(y, 0.65 * r, 0.14 * r))
        elif sort == "warning":
            put("sign_red", regular(y, 1.2 * r, 3, 0))
            put("sign_white", regular(y - 0.02, 0.72 * r, 3, 0))
            put("sign_black", board(y - 0.05 * r, 0.08 * r, 0.24 * r))
        elif sort == "order":
            put("sign_blue", regular(y, r, 16, 0))
            put("sign_white", [(x - 0.4 * r, y, z), (x, y + 0.55 * r, z), (x + 0.4 * r, y, z)])
            put("sign_white", board(y - 0.25 * r, 0.13 * r, 0.3 * r))
        elif sort == "priority":
            put("sign_white", regular(y, 1.15 * r, 4, 0))
            put("sign_yellow", regular(y, 0.85 * r, 4, 0))
        elif sort == "parking":
            put("sign_blue", board(y, 0.8 * r, 0.8 * r))
            put("sign_white", board(y, 0.14 * r, 0.5 * r))
            put("sign_white", board(y + 0.28 * r, 0.35 * r, 0.2 * r))
        else:
            material = "sign_green" if draw[0] < 0.4 else "sign_blue"
            put("sign_white", board(y + 0.9, 1.3, 0.62))
            put(material, board(y + 0.9, 1.24, 0.56))
            for k in (0.2, -0.2):
                put("sign_white", board(y + 0.9 + k, 0.85, 0.09))

    return _thin(x, z, paint, height + 0.4)


SIGNS = ("ban", "stop", "warning", "order", "priority", "parking", "direction")
__all__ = ["SIGNS", "UP", "building", "fence", "hedge", "lamp_post", "traffic_light",
           "traffic_sign", "tree", "utility_pole", "wall"]  # fmt: skip
