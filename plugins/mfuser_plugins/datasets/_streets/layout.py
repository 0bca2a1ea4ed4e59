"""What stands where: one random street, drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mfuser_plugins.datasets._streets import people, roadside, vehicles
from mfuser_plugins.datasets._streets.geometry import (
    UP,
    Camera,
    Painter,
    Point,
    Scene,
    Thing,
    painters_order,
)

START, END = 0.6, 130.0
"""Metres ahead between which the street is drawn."""


@dataclass(frozen=True)
class View:
    """Ranges a domain's cameras are drawn from, as in `Camera`; bonnet: share of images with it."""

    height: tuple[float, float]
    focal: tuple[float, float]
    horizon: tuple[float, float]
    centre: tuple[float, float]
    bonnet: float


@dataclass(frozen=True)
class Street:
    """The road's course: its edges `left` < 0 < `right` about an axis that bends."""

    left: float
    right: float
    bend: float
    walk_left: float
    walk_right: float

    def x(self, offset: float, z: float) -> float:
        """World x of what lies `offset` metres right of the axis, z metres ahead."""
        return offset + 0.5 * self.bend * z * z

    def heading(self, z: float, sign: float = 1.0) -> tuple[float, float]:
        slope = self.bend * z
        n = math.hypot(slope, 1.0)
        return sign * slope / n, sign / n


def draw_scene(
    rng: np.random.Generator, view: View, size: tuple[int, int], supersample: int
) -> Scene:
    """A random street seen by a random camera of `view`, `size` (height, width) pixels.

    All random numbers are in metres or relative units: size and supersampling change none of them.
    """
    camera = Camera(*(float(rng.uniform(*r)) for r in (view.height, view.focal, view.horizon,
                                                       view.centre)))  # fmt: skip
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(28, 60))
    sun = (
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
        math.cos(elevation) * math.cos(azimuth),
    )
    painter = Painter(camera, size, supersample, sun)
    lanes = int(rng.choice((1, 2, 2, 3)))
    street = Street(
        left=-rng.uniform(2.0, 4.2) - (lanes > 1) * 1.6,
        right=rng.uniform(2.0, 4.2) + (lanes > 2) * 2.4,
        bend=rng.choice((-1.0, 1.0)) * rng.uniform(0, 1 / 450) if rng.random() < 0.65 else 0.0,
        walk_left=rng.uniform(1.8, 4.0) if rng.random() < 0.85 else 0.0,
        walk_right=rng.uniform(1.8, 4.0) if rng.random() < 0.85 else 0.0,
    )
    crossing = float(rng.uniform(14, 42)) if rng.random() < 0.4 else None
    tram = rng.random() < 0.3
    _skyline(rng, painter)
    _ground(rng, painter, street, crossing, tram)
    things = [
        *_roadside(rng, street, crossing),
        *_furniture(rng, street, crossing),
        *_traffic(rng, street, crossing, tram),
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
        p.polygon(part, [(x - width, -2, distance),
                         *((x + width * (i / 19.5 - 1), height * s * math.sin(math.pi * i / 39),
                            distance) for i, s in enumerate(shape)),
                         (x + width, -2, distance)])  # fmt: skip
    for _ in range(rng.integers(0, 9)):
        x, width, height = rng.uniform(-150, 150), rng.uniform(8, 22), rng.uniform(10, 55)
        draw, tone, lit = rng.random(3), rng.uniform(0.85, 1.0), rng.random(3)
        z = distance - 10
        p.face("facade", [(x, -1, z), (x, height, z), (x + width, height, z), (x + width, -1, z)],
               (0.0, 0.0, -1.0), draw, tone)  # fmt: skip
        part = p.part("glass", (x, 0, z), draw=lit)
        p.polygons(part, [[(x + 1, y, z), (x + 1, y + 1.8, z), (x + width - 1, y + 1.8, z),
                           (x + width - 1, y, z)] for y in np.arange(4, height - 3, 4.5)])  # fmt: skip


def _strip(
    p: Painter, street: Street, part: int, x0: float, x1: float, z0: float = START, z1: float = END
) -> None:
    """A band of ground along the road."""
    steps = 1 if street.bend == 0 else 2 + int(14 * (z1 - z0) / (END - START))
    # Denser towards the camera, where a bend is seen best.
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
        land = part(str(rng.choice(("grass", "grass", "soil", "paving"))), own=True)
        p.polygon(land, [(x0, 0, START), (x0, 0, FARTHEST), (x1, 0, FARTHEST), (x1, 0, START)])
    left, right = street.left, street.right
    paving, joint, kerb = part("paving"), part("joint"), part("kerb")
    for width, inner, outer in ((street.walk_left, left, left - street.walk_left),
                                (street.walk_right, right, right + street.walk_right)):  # fmt: skip
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
        _strip(p, street, kerb, x - 0.14, x + 0.14)
    if crossing is not None:
        p.polygon(asphalt, [(-200, 0, crossing), (-200, 0, crossing + 7), (200, 0, crossing + 7),
                            (200, 0, crossing)])  # fmt: skip
    for _ in range(rng.integers(0, 5)):
        x, z = rng.uniform(left, right - 1), rng.uniform(3, 25)
        _strip(p, street, part("patch", rng.uniform(0.85, 1.1), own=True), x,
               min(x + rng.uniform(0.6, 2.5), right), z, z + rng.uniform(1, 7))  # fmt: skip
    _markings(rng, p, street, crossing, part("marking"), part("yellow"))
    for _ in range(rng.integers(0, 3)):
        x, z = rng.uniform(left + 0.5, right - 0.5), rng.uniform(4, 15)
        p.polygon(part("manhole"), [(x + 0.35 * math.cos(t), 0, z + 0.35 * math.sin(t))
                                    for t in np.linspace(0, 2 * math.pi, 14)])  # fmt: skip
    if tram:
        for x in (-0.75, 0.75):
            offset = _tram_offset(street) + x
            _strip(p, street, part("rail"), offset - 0.06, offset + 0.06)


FARTHEST = 4000.0
"""Metres; where the land meets the horizon."""


def _tram_offset(street: Street) -> float:
    return street.left + 1.9


def _markings(
    rng: np.random.Generator, p: Painter, street: Street, crossing: float | None, white: int,
    yellow: int,
) -> None:  # fmt: skip
    left, right = street.left, street.right
    middle = -0.4 + rng.uniform(-0.5, 0.5) + (left + right) / 2 * 0.3
    sort = rng.choice(("dashed", "dashed", "double", "solid", "none"))
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


def _roadside(rng: np.random.Generator, street: Street, crossing: float | None) -> list[Thing]:
    """Houses, walls, fences, hedges and trees along both sides."""
    things: list[Thing] = []
    for side, edge in ((-1, street.left - street.walk_left), (1, street.right + street.walk_right)):
        urban = rng.uniform(0.15, 0.75)
        tall = rng.uniform(4, 20)
        z = rng.uniform(1.0, 5.0)
        while z < 100:
            length = rng.uniform(6, 17)
            z1 = z + length
            if crossing is not None and z1 > crossing - 1.5 and z < crossing + 8.5:
                if z > crossing - 8 or crossing - 1.5 - z < 5:
                    z = crossing + 8.5 + rng.uniform(0, 3)
                    continue
                z1 = crossing - 1.5
            near = (street.x(edge + side * 0.3, z), z)
            far = (street.x(edge + side * 0.3, z1), z1)
            things += _lot(rng, near, far, side, urban, tall)
            z = z1 + (rng.uniform(0.5, 4) if rng.random() < 0.35 else 0.05)
    return things


def _lot(
    rng: np.random.Generator, near: tuple[float, float], far: tuple[float, float], side: int,
    urban: float, tall: float,
) -> list[Thing]:  # fmt: skip
    """What stands between two points of the roadside."""

    def behind(distance: float) -> tuple[tuple[float, float], tuple[float, float]]:
        d = side * distance
        return (near[0] + d, near[1]), (far[0] + d, far[1])

    def somewhere(distance: float) -> tuple[float, float]:
        t = rng.uniform(0.1, 0.9)
        return near[0] + t * (far[0] - near[0]) + side * distance, near[1] + t * (far[1] - near[1])

    things: list[Thing] = []
    barrier = float(rng.random())
    height = max(3.5, tall * rng.uniform(0.6, 1.5))
    if rng.random() < urban and barrier > 0.5:
        things.append(roadside.building(rng, *behind(rng.uniform(0, 1.2)), side, height))
        return things
    set_back = rng.uniform(5, 11)
    if barrier < 0.27:
        things.append(roadside.wall(rng, near, far, side, rng.uniform(1.1, 2.8)))
    elif barrier < 0.56:
        sort = str(rng.choice(("boards", "lattice", "guardrail"), p=(0.42, 0.38, 0.2)))
        things.append(roadside.fence(rng, near, far, side, rng.uniform(1.1, 2.1), sort))
    elif barrier < 0.68:
        things += roadside.hedge(rng, *behind(0.7), rng.uniform(1.0, 2.0))
    for _ in range(rng.integers(0, 4)):
        x, z = somewhere(rng.uniform(1.0, 4.0))
        sort = str(rng.choice(("round", "round", "tall", "conifer", "bush")))
        tree_height = rng.uniform(1.0, 2.0) if sort == "bush" else rng.uniform(4, 9)
        things.append(roadside.tree(rng, x, z, tree_height, sort))
    if rng.random() < 0.25 + 0.6 * urban:
        things.append(roadside.building(rng, *behind(set_back), side, min(height, 9.0)))
    return things


def _furniture(rng: np.random.Generator, street: Street, crossing: float | None) -> list[Thing]:
    """Lamps, signals, signs and street trees between road and sidewalk."""
    things: list[Thing] = []
    for side, edge, walk in ((-1, street.left, street.walk_left),
                             (1, street.right, street.walk_right)):  # fmt: skip
        z = rng.uniform(5.0, 10.0)
        avenue = walk > 2.2 and rng.random() < 0.35
        while z < 75:
            x = street.x(edge + side * rng.uniform(0.4, 0.8), z)
            clear = crossing is None or not crossing - 0.5 < z < crossing + 7.5
            what = rng.choice(("lamp", "signal", "sign", "utility", "none"),
                              p=(0.27, 0.2, 0.33, 0.06, 0.14))  # fmt: skip
            if clear and what == "lamp":
                things.append(roadside.lamp_post(rng, x, z, side))
            elif clear and what == "signal":
                things.append(roadside.traffic_light(rng, x, z, side))
            elif clear and what == "sign":
                sort = str(rng.choice(roadside.SIGNS))
                things.append(roadside.traffic_sign(rng, x, z, sort))
            elif clear and what == "utility":
                things.append(roadside.utility_pole(rng, x, z))
            elif clear and avenue:
                things.append(roadside.tree(rng, x, z, rng.uniform(4.5, 7.5), "round"))
            z += rng.uniform(3.5, 12)
        if crossing is not None and rng.random() < 0.75:
            z = crossing - 1.2
            x = street.x(edge + side * 0.6, z)
            things.append(roadside.traffic_light(rng, x, z, side))
    return things


class _Plots:
    """Ground already taken: boxes (x0, x1, z0, z1)."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float, float, float]] = []

    def take(self, x: float, z: float, half_x: float, half_z: float) -> bool:
        box = x - half_x, x + half_x, z - half_z, z + half_z
        if any(box[0] < o[1] and o[0] < box[1] and box[2] < o[3] and o[2] < box[3]
               for o in self._taken):  # fmt: skip
            return False
        self._taken.append(box)
        return True


_LENGTH = {"car": 4.6, "truck": 8.2, "bus": 11.4, "train": 22.2}


def _traffic(
    rng: np.random.Generator, street: Street, crossing: float | None, tram: bool
) -> list[Thing]:
    """Vehicles in their lanes, on the crossing and at the kerb; persons and two-wheelers."""
    things: list[Thing] = []
    plots = _Plots()

    def along(kind: str, offset: float, z: float, sign: float) -> None:
        length = _LENGTH[kind]
        x = street.x(offset, z)
        if plots.take(x, z, 1.5, length / 2 + 0.8):
            things.append(vehicles.vehicle(rng, kind, x, z, street.heading(z, sign)))

    def across(kind: str, x: float, z: float) -> None:
        if plots.take(x, z, _LENGTH[kind] / 2 + 0.8, 1.6):
            sign = float(rng.choice((-1, 1)))
            tilt = rng.normal(0, 0.1)
            heading = sign * math.cos(tilt), math.sin(tilt)
            things.append(vehicles.vehicle(rng, kind, x, z, heading))

    left, right = street.left, street.right
    oncoming, ahead = left * 0.5 - 0.1, right * 0.5 + 0.1
    if tram and rng.random() < 0.85:
        along("train", _tram_offset(street), rng.uniform(20, 38), float(rng.choice((-1, 1))))
    elif rng.random() < 0.16:
        z = crossing + 4.0 if crossing is not None else rng.uniform(22, 34)
        across("train", rng.uniform(-9, 9), z)
    for kind, chance in (("bus", 0.36), ("truck", 0.4)):
        if rng.random() < chance:
            z = rng.uniform(10, 17) + 16 * rng.random() ** 2
            if rng.random() < 0.22:
                across(kind, rng.uniform(-5, 5), crossing + 2.5 if crossing else rng.uniform(12, 26))
            elif rng.random() < 0.55:
                along(kind, oncoming - 0.3, z, -1.0)
            else:
                along(kind, ahead + 0.3, z + 2, 1.0)
    for _ in range(rng.integers(1, 6)):
        z = rng.uniform(6.5, 12) + 45 * rng.random() ** 2
        if rng.random() < 0.5:
            along("car", oncoming + rng.uniform(-0.3, 0.3), z, -1.0)
        else:
            along("car", ahead + rng.uniform(-0.3, 0.3), z + 2.5, 1.0)
    if rng.random() < 0.55:
        side, edge = (-1, left) if rng.random() < 0.5 else (1, right)
        z = rng.uniform(4.5, 10)
        for _ in range(rng.integers(1, 6)):
            along("car", edge - side * 1.15, z, float(side) if rng.random() < 0.85 else -side)
            z += rng.uniform(5.5, 9)
    if rng.random() < 0.4:
        z = crossing + rng.uniform(1.5, 5.5) if crossing is not None else rng.uniform(9, 22)
        across("car", rng.uniform(-7, 7), z)
    return things + _walkers(rng, street, plots) + _riders(rng, street, plots)


def _walkers(rng: np.random.Generator, street: Street, plots: _Plots) -> list[Thing]:
    things = []
    left, right = street.left, street.right
    for _ in range(rng.integers(1, 6)):
        z = rng.uniform(4.5, 9) + 22 * rng.random() ** 2
        if rng.random() < 0.78:
            side, edge = (-1, left) if rng.random() < 0.5 else (1, right)
            offset = edge + side * rng.uniform(0.9, 2.4)
        else:
            offset = rng.uniform(left, right)
            z += 3
        for _ in range(1 + (rng.random() < 0.3)):
            x = street.x(offset, z)
            if plots.take(x, z, 0.3, 0.25):
                things.append(people.person(rng, x, z))
            offset += 0.65
            z += rng.uniform(-0.3, 0.3)
    return things


def _riders(rng: np.random.Generator, street: Street, plots: _Plots) -> list[Thing]:
    things = []
    left, right = street.left, street.right
    for kind, chance in (("bicycle", 0.62), ("motorcycle", 0.58)):
        while rng.random() < chance:
            chance *= 0.45
            z = rng.uniform(5, 9) + 14 * rng.random() ** 2
            ridden = rng.random() < 0.68
            if ridden:
                offset = rng.uniform(left + 0.5, right - 0.5)
            else:
                side, edge = (-1, left) if rng.random() < 0.5 else (1, right)
                offset = edge + side * rng.uniform(0.2, 1.6)
            turn = rng.uniform(0, 2 * math.pi)
            # A random angle pulled towards the road's own direction or straight across it.
            turn = turn + 0.18 * math.sin(4 * turn)
            x = street.x(offset, z)
            if plots.take(x, z, 0.9, 0.6):
                heading = math.sin(turn), math.cos(turn)
                things.append(people.two_wheeler(rng, kind, x, z, heading, ridden))
    return things


def _bonnet(rng: np.random.Generator, p: Painter) -> None:
    """The front of the car that carries the camera: no class."""
    z = 1.0
    part = p.part("bonnet", (0.0, 0.0, z), (0.0, 0.92, -0.39), rng.random(3))
    f, h = p.camera.focal, p.camera.height
    bottom = h - (1.05 - p.camera.horizon) / f
    rise, half = rng.uniform(0.06, 0.12) / f, rng.uniform(0.7, 1.1) / f
    shift = rng.uniform(-0.1, 0.1)
    p.polygon(part, [(shift + half * t, bottom + rise * (1 - abs(t) ** 3) + 0.05 / f, z)
                     for t in np.linspace(-1, 1, 21)] + [(shift, bottom - 1, z)])  # fmt: skip
