"""The layout of one random street."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mfuser_streets.chance import one_of
from mfuser_streets.geometry import (
    UP,
    Camera,
    Painter,
    Point,
    Scene,
    painters_order,
)
from mfuser_streets.roadside import roadside, street_furniture
from mfuser_streets.street import City, Street
from mfuser_streets.traffic import traffic

START, END = 0.6, 130.0
"""Meters ahead between which the street is drawn."""


@dataclass(frozen=True)
class View:
    """Ranges a domain's cameras are drawn from, as in `Camera`; bonnet: share of images with it."""

    height: tuple[float, float]
    focal: tuple[float, float]
    horizon: tuple[float, float]
    center: tuple[float, float]
    bonnet: float


def draw_scene(
    rng: np.random.Generator,
    view: View,
    size: tuple[int, int],
    supersample: int,
    city: City = City(),  # noqa: B008  (frozen)
) -> Scene:
    """A random street of `city` seen by a camera of `view`, `size` (height, width) pixels.

    All random numbers are in meters or relative units: size and supersampling change none of them.
    """
    camera = Camera(
        *(float(rng.uniform(*r)) for r in (view.height, view.focal, view.horizon, view.center))
    )
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(28, 60))
    sun = (
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
        math.cos(elevation) * math.cos(azimuth),
    )
    painter = Painter(camera, size, supersample, sun, city.stout)
    lanes = one_of(rng, (1, 2, 2, 3))
    street = Street(
        left=-rng.uniform(2.9, 4.4) - (lanes > 1) * 1.6,
        right=rng.uniform(2.9, 4.4) + (lanes > 2) * 2.4,
        bend=one_of(rng, (-1.0, 1.0)) * rng.uniform(0, 1 / 450) if rng.random() < 0.65 else 0.0,
        walk_left=rng.uniform(1.8, 4.0) if rng.random() < 0.85 else 0.0,
        walk_right=rng.uniform(1.8, 4.0) if rng.random() < 0.85 else 0.0,
    )
    crossing = float(rng.uniform(14, 42)) if rng.random() < 0.4 else None
    tram = rng.random() < 0.3
    _skyline(rng, painter)
    _ground(rng, painter, street, crossing, tram)
    things = [
        *roadside(rng, street, crossing, city),
        *street_furniture(rng, street, crossing, city),
        *traffic(rng, street, crossing, tram, city),
    ]
    for thing in things:
        if thing.shade is not None:
            thing.shade(painter)
    for i in painters_order(things):
        things[i].paint(painter)
    if rng.random() < view.bonnet:
        _bonnet(rng, painter)
    return painter.scene()


def _skyline(rng: np.random.Generator, p: Painter) -> None:
    """Towers, woods and hills at the end of the view."""
    distance = 180.0
    for _ in range(rng.integers(1, 4)):
        x = rng.uniform(-260, 260)
        shape = list(rng.uniform(0.75, 1.15, 40))
        part = p.part("leaf", (x, 0, distance), draw=rng.random(3), tone=rng.uniform(0.75, 0.95))
        width, height = rng.uniform(40, 120), rng.uniform(5, 20)
        p.polygon(
            part,
            [
                (x - width, -2, distance),
                *(
                    (x + width * (i / 19.5 - 1), height * s * math.sin(math.pi * i / 39), distance)
                    for i, s in enumerate(shape)
                ),
                (x + width, -2, distance),
            ],
        )
    for _ in range(rng.integers(0, 9)):
        x, width, height = rng.uniform(-150, 150), rng.uniform(8, 22), rng.uniform(10, 55)
        draw, tone, lit = rng.random(3), rng.uniform(0.85, 1.0), rng.random(3)
        z = distance - 10
        p.face(
            "facade",
            [(x, -1, z), (x, height, z), (x + width, height, z), (x + width, -1, z)],
            (0.0, 0.0, -1.0),
            draw,
            tone,
        )
        part = p.part("glass", (x, 0, z), draw=lit)
        p.polygons(
            part,
            [
                [
                    (x + 1, y, z),
                    (x + 1, y + 1.8, z),
                    (x + width - 1, y + 1.8, z),
                    (x + width - 1, y, z),
                ]
                for y in np.arange(4, height - 3, 4.5)
            ],
        )


def _strip(
    p: Painter, street: Street, part: int, x0: float, x1: float, z0: float = START, z1: float = END
) -> None:
    """A band of ground along the road."""
    steps = 1 if street.bend == 0 else 2 + int(14 * (z1 - z0) / (END - START))
    # Denser toward the camera, where a bend is seen best.
    zs = [z0 * (z1 / z0) ** (i / steps) for i in range(steps + 1)]
    near_side = [(street.x(x0, z), 0.0, z) for z in zs]
    far_side = [(street.x(x1, z), 0.0, z) for z in reversed(zs)]
    p.polygon(part, near_side + far_side)


def _ground(
    rng: np.random.Generator, p: Painter, street: Street, crossing: float | None, tram: bool
) -> None:
    origin: Point = (0.0, 0.0, 10.0)
    draw = rng.random(3)

    def part(material: str, tone: float = 1.0, own: bool = False) -> int:
        return p.part(material, origin, UP, rng.random(3) if own else draw, tone)

    for x0, x1 in ((-400.0, 0.0), (0.0, 400.0)):
        land = part(one_of(rng, ("grass", "grass", "soil", "paving")), own=True)
        p.polygon(land, [(x0, 0, START), (x0, 0, FARTHEST), (x1, 0, FARTHEST), (x1, 0, START)])
    left, right = street.left, street.right
    paving, joint, curb = part("paving"), part("joint"), part("curb")
    for width, inner, outer in (
        (street.walk_left, left, left - street.walk_left),
        (street.walk_right, right, right + street.walk_right),
    ):
        if width:
            _strip(p, street, paving, outer, inner)
            for t in (0.33, 0.66):
                x = inner + t * (outer - inner)
                _strip(p, street, joint, x - 0.03, x + 0.03)
            for z in np.arange(3.0, 26.0, 1.3):
                _strip(p, street, joint, inner, outer, z, z + 0.05)
    asphalt = part("asphalt")
    _strip(p, street, asphalt, left, right)
    for x in (left, right):
        _strip(p, street, curb, x - 0.14, x + 0.14)
    if crossing is not None:
        p.polygon(
            asphalt,
            [
                (-200, 0, crossing),
                (-200, 0, crossing + 7),
                (200, 0, crossing + 7),
                (200, 0, crossing),
            ],
        )
    for _ in range(rng.integers(0, 5)):
        x, z = rng.uniform(left, right - 1), rng.uniform(3, 25)
        _strip(
            p,
            street,
            part("patch", rng.uniform(0.85, 1.1), own=True),
            x,
            min(x + rng.uniform(0.6, 2.5), right),
            z,
            z + rng.uniform(1, 7),
        )
    _markings(rng, p, street, crossing, part("marking"), part("yellow"))
    for _ in range(rng.integers(0, 3)):
        x, z = rng.uniform(left + 0.5, right - 0.5), rng.uniform(4, 15)
        p.polygon(
            part("manhole"),
            [
                (x + 0.35 * math.cos(t), 0, z + 0.35 * math.sin(t))
                for t in np.linspace(0, 2 * math.pi, 14)
            ],
        )
    if tram:
        for x in (-0.75, 0.75):
            offset = street.tram + x
            _strip(p, street, part("rail"), offset - 0.06, offset + 0.06)


FARTHEST = 4000.0
"""Meters; where the land meets the horizon."""


def _markings(
    rng: np.random.Generator,
    p: Painter,
    street: Street,
    crossing: float | None,
    white: int,
    yellow: int,
) -> None:
    left, right = street.left, street.right
    middle = -0.4 + rng.uniform(-0.5, 0.5) + (left + right) / 2 * 0.3
    sort = one_of(rng, ("dashed", "dashed", "double", "solid", "none"))
    spans = [(2.0, END)] if crossing is None else [(2.0, crossing - 2.5), (crossing + 8, END)]
    for z0, z1 in spans:
        if z1 <= z0:
            continue
        if sort == "double":
            for x in (middle - 0.17, middle + 0.17):
                _strip(p, street, yellow, x - 0.06, x + 0.06, z0, z1)
        elif sort == "solid":
            _strip(p, street, white, middle - 0.07, middle + 0.07, z0, z1)
        elif sort == "dashed":
            for z in np.arange(z0, min(z1, 70.0) - 3, 6.0):
                _strip(p, street, white, middle - 0.07, middle + 0.07, z, z + 3)
    if rng.random() < 0.5:
        for x in (left + 0.35, right - 0.35):
            for z0, z1 in spans:
                if z1 > z0:
                    _strip(p, street, white, x - 0.06, x + 0.06, z0, z1)
    z = crossing - 4.2 if crossing is not None else rng.uniform(7, 20)
    if crossing is not None or rng.random() < 0.2:
        for x in np.arange(left + 0.4, right - 0.4, 1.0):
            _strip(p, street, white, x, x + 0.5, z, z + 3)


def _bonnet(rng: np.random.Generator, p: Painter) -> None:
    """The front of the car that carries the camera: no class."""
    z = 1.0
    part = p.part("bonnet", (0.0, 0.0, z), (0.0, 0.92, -0.39), rng.random(3))
    f, h = p.camera.focal, p.camera.height
    bottom = h - (1.05 - p.camera.horizon) / f
    rise, half = rng.uniform(0.06, 0.12) / f, rng.uniform(0.7, 1.1) / f
    shift = rng.uniform(-0.1, 0.1)
    p.polygon(
        part,
        [
            (shift + half * t, bottom + rise * (1 - abs(t) ** 3) + 0.05 / f, z)
            for t in np.linspace(-1, 1, 21)
        ]
        + [(shift, bottom - 1, z)],
    )
