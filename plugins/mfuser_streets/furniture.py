"""Things on a post: lamps, traffic lights and signs. `side`: -1 left, +1 right of the road."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mfuser_streets.chance import weighted
from mfuser_streets.geometry import FACING, Draw, Painter, Point, Thing


def _post(
    p: Painter,
    x: float,
    z: float,
    height: float,
    radius: float,
    draw: Draw,
    material: str = "metal",
) -> int:
    radius *= p.stout
    part = p.part(material, (x, 1, z), draw=draw)
    p.polygon(
        part,
        [(x - radius, 0, z), (x - radius, height, z), (x + radius, height, z), (x + radius, 0, z)],
    )
    light = p.part(material, (x, 1, z), draw=draw, tone=1.18)
    p.polygon(
        light,
        [
            (x - radius, 0, z),
            (x - radius, height, z),
            (x - radius * 0.3, height, z),
            (x - radius * 0.3, 0, z),
        ],
    )
    return part


def _thin(x: float, z: float, paint: Callable[[Painter], None], height: float) -> Thing:
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
        p.limb(
            p.part("lamp", (x, 1, z)),
            (tip + side * 0.35, height + 0.4, z),
            (tip - side * 0.3, height + 0.4, z),
            0.13,
            0.13,
        )

    return _thin(x, z, paint, height)


def utility_pole(rng: np.random.Generator, x: float, z: float) -> Thing:
    draw = rng.random(3)
    height = rng.uniform(7, 9)

    def paint(p: Painter) -> None:
        part = _post(p, x, z, height, 0.14, draw, "timber")
        for y, w in ((height - 0.5, 1.0), (height - 1.3, 0.8)):
            p.polygon(
                part, [(x - w, y, z), (x - w, y + 0.14, z), (x + w, y + 0.14, z), (x + w, y, z)]
            )

    return _thin(x, z, paint, height)


def traffic_light(rng: np.random.Generator, x: float, z: float, side: int) -> Thing:
    """A signal on a post, often with a second one on an arm over the road."""
    draw = rng.random(3)
    arm = rng.random() < 0.45
    state = weighted(rng, (0, 1, 2), (0.45, 0.1, 0.45))
    height = rng.uniform(2.9, 3.5)

    def head(p: Painter, cx: float, y: float, scale: float) -> None:
        center = (cx, y, z)
        scale *= p.stout
        w, h = 0.26 * scale, 0.62 * scale
        for material, grow in (("backplate", 0.09 * scale), ("housing", 0.0)):
            part = p.part(material, center, draw=draw)
            p.polygon(
                part,
                [
                    (cx - w - grow, y - h - grow, z),
                    (cx - w - grow, y + h + grow, z),
                    (cx + w + grow, y + h + grow, z),
                    (cx + w + grow, y - h - grow, z),
                ],
            )
        for i, name in enumerate(("red_light", "amber_light", "green_light")):
            part = p.part(name if i == state else "dark_light", center)
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
        return [
            (
                x + r * math.sin(turn + 2 * math.pi * i / sides),
                y + r * math.cos(turn + 2 * math.pi * i / sides),
                z,
            )
            for i in range(sides)
        ]

    def board(y: float, w: float, h: float) -> list[Point]:
        return [(x - w, y - h, z), (x - w, y + h, z), (x + w, y + h, z), (x + w, y - h, z)]

    def paint(p: Painter) -> None:
        def put(material: str, shape: list[Point]) -> None:
            p.face(material, shape, FACING, draw)

        top = height + (1.5 if sort == "direction" else 0.4)
        _post(p, x, z, top, 0.06, draw)
        y, r = height, size * p.stout
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
            put(
                "sign_white",
                [(px + 0.08 * r, py, pz) for px, py, pz in regular(y + 0.2 * r, 0.36 * r, 12, 0)],
            )
            put(
                "sign_blue",
                [(px + 0.08 * r, py, pz) for px, py, pz in regular(y + 0.2 * r, 0.17 * r, 12, 0)],
            )
            put(
                "sign_white",
                [(px - 0.24 * r, py, pz) for px, py, pz in board(y, 0.09 * r, 0.55 * r)],
            )
        else:
            material = "sign_green" if draw[0] < 0.4 else "sign_blue"
            put("sign_white", board(y + 0.9, 1.3, 0.62))
            put(material, board(y + 0.9, 1.24, 0.56))
            for k in (0.2, -0.2):
                put("sign_white", board(y + 0.9 + k, 0.85, 0.09))

    return _thin(x, z, paint, height + 0.4)


SIGNS = ("ban", "stop", "warning", "order", "priority", "parking", "direction")
