"""Cars, trucks, buses and trains: side views, extruded to their width, seen from any angle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mfuser_streets.chance import weighted
from mfuser_streets.geometry import Draw, Painter, Point, Thing, Vector

Corner = tuple[float, float]
"""(along, up) in meters: along grows to the front."""
Profile = tuple[Corner, ...]
"""Clockwise from the lower rear."""


@dataclass(frozen=True)
class Model:
    """One vehicle's shape.

    side: polygons on the side face, by material. wheels: (along, radius). lamps: height of the
    lights above the road. glazed: edges of the profile with a pane. body: material of the rest.
    """

    kind: str
    profile: Profile
    width: float
    side: tuple[tuple[str, tuple[Profile, ...]], ...]
    wheels: tuple[tuple[float, float], ...]
    lamps: float
    glazed: tuple[int, ...] = ()
    body: str = "paint"

    @property
    def length(self) -> float:
        return max(a for a, _ in self.profile)


def _row(start: float, stop: float, count: int, low: float, high: float) -> tuple[Profile, ...]:
    """Equal windows in a row."""
    step = (stop - start) / count
    return tuple(
        ((a, low), (a, high), (a + 0.86 * step, high), (a + 0.86 * step, low))
        for a in (start + (i + 0.07) * step for i in range(count))
    )


def _box(a0: float, a1: float, low: float, high: float) -> Profile:
    return ((a0, low), (a0, high), (a1, high), (a1, low))


SALOON = Model(
    "car",
    ((0, 0.3), (0, 0.9), (0.75, 1.0), (1.35, 1.42), (2.6, 1.45), (3.35, 0.98), (4.35, 0.8),
     (4.45, 0.3)),
    1.8,
    (
        ("glass", (((0.95, 1.0), (1.4, 1.36), (1.98, 1.39), (1.98, 1.0)),
                   ((2.06, 1.0), (2.06, 1.39), (2.55, 1.38), (3.1, 1.0)))),
        ("trim", (_box(2.0, 2.04, 0.45, 1.0), _box(0, 4.45, 0.22, 0.36))),
    ),
    ((0.85, 0.33), (3.55, 0.33)), 0.72, (2, 4),
)  # fmt: skip
HATCHBACK = Model(
    "car",
    ((0, 0.3), (0.02, 0.95), (0.35, 1.45), (2.3, 1.5), (3.05, 1.0), (3.85, 0.85), (3.95, 0.3)),
    1.75,
    (
        ("glass", (((0.3, 1.02), (0.55, 1.38), (1.35, 1.43), (1.35, 1.02)),
                   ((1.43, 1.02), (1.43, 1.43), (2.25, 1.43), (2.85, 1.02)))),
        ("trim", (_box(1.37, 1.41, 0.45, 1.02), _box(0, 3.95, 0.22, 0.36))),
    ),
    ((0.7, 0.32), (3.15, 0.32)), 0.75, (1, 3),
)  # fmt: skip
SUV = Model(
    "car",
    ((0, 0.35), (0, 1.1), (0.25, 1.7), (2.75, 1.75), (3.45, 1.18), (4.5, 1.02), (4.6, 0.35)),
    1.9,
    (
        ("glass", (((0.25, 1.18), (0.45, 1.62), (1.55, 1.66), (1.55, 1.18)),
                   ((1.65, 1.18), (1.65, 1.66), (2.68, 1.66), (3.25, 1.18)))),
        ("trim", (_box(1.58, 1.62, 0.5, 1.18), _box(0, 4.6, 0.28, 0.46))),
    ),
    ((0.85, 0.38), (3.7, 0.38)), 0.9, (1, 3),
)  # fmt: skip
VAN = Model(
    "car",
    ((0, 0.35), (0, 1.95), (3.7, 2.0), (4.3, 1.2), (4.95, 1.05), (5.0, 0.35)),
    1.95,
    (
        ("glass", (((2.9, 1.2), (2.9, 1.78), (3.55, 1.78), (4.05, 1.2)),)),
        ("trim", (_box(2.8, 2.84, 0.45, 1.8), _box(0, 5.0, 0.25, 0.4))),
    ),
    ((0.95, 0.36), (4.1, 0.36)), 0.85, (2,),
)  # fmt: skip
TRUCK_CAB = Model(
    "truck",
    ((6.2, 0.5), (6.2, 2.7), (7.6, 2.75), (7.95, 1.5), (8.0, 0.5)),
    2.35,
    (
        ("glass", (((6.55, 1.55), (6.55, 2.35), (7.5, 2.35), (7.72, 1.55)),)),
        ("trim", (_box(6.42, 6.46, 0.7, 2.4), _box(6.2, 8.0, 0.38, 0.6))),
    ),
    ((7.1, 0.5),), 0.85, (2,),
)  # fmt: skip
TRUCK_BOX = Model(
    "truck",
    ((0, 0.95), (0, 3.3), (6.0, 3.3), (6.0, 0.95)),
    2.45,
    (("trim", (_box(0.1, 6.1, 0.65, 0.95),)),),
    ((1.1, 0.5), (2.2, 0.5)), 0.8, (), "cargo",
)  # fmt: skip
TIPPER = Model(
    "truck",
    ((0, 1.0), (-0.1, 2.2), (6.1, 2.35), (6.0, 1.0)),
    2.45,
    (
        ("trim", (_box(0.1, 6.1, 0.65, 1.0), *(_box(x, x + 0.12, 1.0, 2.2) for x in (1, 2.5, 4)))),
    ),
    ((1.1, 0.5), (2.2, 0.5)), 0.8, (),
)  # fmt: skip
BUS = Model(
    "bus",
    ((0, 0.35), (0, 3.0), (11.0, 3.05), (11.2, 1.2), (11.2, 0.35)),
    2.55,
    (
        ("band", (_box(0.0, 11.2, 0.95, 1.2),)),
        ("glass", _row(0.3, 9.7, 7, 1.4, 2.5) + (_box(10.0, 10.85, 0.5, 2.5),)),
        ("trim", (_box(9.75, 9.85, 0.4, 2.9), _box(0, 11.2, 0.25, 0.42))),
    ),
    ((2.4, 0.48), (8.6, 0.48)), 0.75, (0, 2),
)  # fmt: skip
TRAIN = Model(
    "train",
    ((0, 0.3), (0, 1.1), (0.5, 3.3), (21.5, 3.3), (22.0, 1.1), (22.0, 0.3)),
    2.5,
    (
        ("band", (_box(0.05, 21.95, 0.85, 1.3),)),
        ("glass", _row(1.2, 20.8, 11, 1.5, 2.6)),
        ("trim", (*(_box(x, x + 0.1, 0.5, 2.8) for x in (4.6, 8.2, 13.5, 17.1)),
                  _box(0, 22, 0.12, 0.45), _box(7.2, 14.8, 3.3, 3.5))),
    ),
    (), 0.8, (1, 3),
)  # fmt: skip

CARS = (SALOON, HATCHBACK, SUV, VAN)
_WHEEL = [(math.cos(t * math.pi / 6), math.sin(t * math.pi / 6)) for t in range(12)]


@dataclass(frozen=True)
class Pose:
    """Where the middle of a vehicle stands, and the unit direction (x, z) of its front."""

    x: float
    z: float
    heading: tuple[float, float]
    length: float

    def at(self, along: float, up: float, across: float) -> Point:
        """Meters from the rear, above the road, to the right of the axis -> world."""
        hx, hz = self.heading
        a = along - self.length / 2
        return self.x + hx * a + hz * across, up, self.z + hz * a - hx * across

    def panel(self, start: Corner, end: Corner, b0: float, b1: float) -> list[Point]:
        """The quad over an edge (along, up) - (along, up), between two places across."""
        return [self.at(*start, b0), self.at(*end, b0), self.at(*end, b1), self.at(*start, b1)]

    def direction(self, along: float, up: float) -> Vector:
        n = math.hypot(along, up) or 1.0
        return self.heading[0] * along / n, up / n, self.heading[1] * along / n


def _extrude(p: Painter, model: Model, pose: Pose, draw: Draw) -> None:
    kind, half = model.kind, model.width / 2
    tire = p.part(f"{kind}_tire", pose.at(0, 0.3, 0))
    for along, radius in model.wheels:
        for side in (-1.0, 1.0):
            b = side * (half - 0.15)
            corners = [
                pose.at(along + s * radius * 0.6, y, b + t)
                for s, y, t in (
                    (-1, 0, -0.12),
                    (-1, 2 * radius, -0.12),
                    (1, 2 * radius, 0.12),
                    (1, 0, 0.12),
                )
            ]
            p.polygon(tire, corners)
    edges = []
    for i, (start, end) in enumerate(zip(model.profile, model.profile[1:], strict=False)):
        normal = pose.direction(-(end[1] - start[1]), end[0] - start[0])
        middle = pose.at((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, 0)
        if p.faces_camera(middle, normal):
            edges.append((-math.hypot(middle[0], middle[2]), i, start, end, normal))
    for _, i, start, end, normal in sorted(edges):
        quad = pose.panel(start, end, -half, half)
        p.face(f"{kind}_{model.body}", quad, normal, draw)
        if i in model.glazed:
            _glaze(p, model, pose, start, end, normal)
        if i in (0, len(model.profile) - 2) and model.lamps:
            _ends(p, model, pose, front=i != 0, normal=normal)
    right = (pose.heading[1], 0.0, -pose.heading[0])
    for side in (-1.0, 1.0):
        normal = (side * right[0], 0.0, side * right[2])
        if p.faces_camera(pose.at(model.length / 2, 0.5, side * half), normal):
            _side(p, model, pose, draw, side * half, normal)


def _side(p: Painter, model: Model, pose: Pose, draw: Draw, b: float, normal: Vector) -> None:
    body = [pose.at(a, y, b) for a, y in model.profile]
    p.face(f"{model.kind}_{model.body}", body, normal, draw)
    for material, shapes in model.side:
        part = p.part(f"{model.kind}_{material}", body[0], normal, draw)
        for shape in shapes:
            p.polygon(part, [pose.at(a, y, b) for a, y in shape])
    tire = p.part(f"{model.kind}_tire", body[0], normal)
    rim = p.part(f"{model.kind}_rim", body[0], normal)
    for along, radius in model.wheels:
        for part, r in ((tire, radius * 1.12), (rim, radius * 0.58)):
            p.polygon(part, [pose.at(along + r * c, radius + r * s, b) for c, s in _WHEEL])


def _glaze(
    p: Painter, model: Model, pose: Pose, start: Corner, end: Corner, normal: Vector
) -> None:
    """A pane inside an edge. Upright ones are glazed above the waist only."""
    (a0, y0), (a1, y1) = start, end
    low, high = 0.1, 0.9
    if abs(y1 - y0) > 1.5:
        low, high = (0.45, 0.92) if y1 > y0 else (0.08, 0.6)
    half = model.width / 2 - 0.14
    lower = a0 + low * (a1 - a0), y0 + low * (y1 - y0)
    upper = a0 + high * (a1 - a0), y0 + high * (y1 - y0)
    p.face(f"{model.kind}_glass", pose.panel(lower, upper, -half, half), normal)


def _ends(p: Painter, model: Model, pose: Pose, front: bool, normal: Vector) -> None:
    """Bumper, grille, lights and number plate on the first or last edge."""
    kind, half, y = model.kind, model.width / 2, model.lamps
    a = model.length + 0.01 if front else min(model.profile[0][0], model.profile[1][0]) - 0.01
    tall, wide = (0.085, 0.34) if kind == "car" else (0.13, 0.36)
    bottom = model.profile[0][1]
    trim = p.part(f"{kind}_trim", pose.at(a, y, 0), normal)

    def panel(part: int, y0: float, y1: float, b0: float, b1: float) -> None:
        p.polygon(part, pose.panel((a, y0), (a, y1), b0, b1))

    if bottom < 0.6:
        panel(trim, bottom - 0.08, bottom + 0.1, -half, half)
    outer, inner = half - 0.08, half - 0.08 - wide
    if front:
        panel(trim, y - tall, y + 0.6 * tall, -inner, inner)
    if kind != "train":
        plate = p.part(f"{kind}_plate", pose.at(a, y, 0), normal)
        panel(plate, y - 0.24, y - 0.12, -0.25, 0.25)
    lamp = p.part(f"{kind}_{'head' if front else 'tail'}", pose.at(a, y, 0), normal)
    for side in (-1.0, 1.0):
        panel(trim, y - tall - 0.03, y + tall + 0.03, side * (outer + 0.03), side * (inner - 0.03))
        panel(lamp, y - tall, y + tall, side * outer, side * inner)


def vehicle(
    rng: np.random.Generator, kind: str, x: float, z: float, heading: tuple[float, float]
) -> Thing:
    """A car, truck, bus or train whose middle stands at (x, z)."""
    draw = rng.random(3)
    models: tuple[Model, ...]
    if kind == "car":
        models = (weighted(rng, CARS, (0.35, 0.3, 0.23, 0.12)),)
    elif kind == "truck":
        cargo = TRUCK_BOX if rng.random() < 0.65 else TIPPER
        models = (cargo, TRUCK_CAB)
    else:
        models = (BUS,) if kind == "bus" else (TRAIN,)
    length, width = max(m.length for m in models), max(m.width for m in models)
    top = max(y for m in models for _, y in m.profile)
    pose = Pose(x, z, heading, length)
    corners = [
        pose.at(a, 0, b)
        for a, b in ((0, -width / 2), (length, -width / 2), (length, width / 2), (0, width / 2))
    ]
    footprint = [(c[0], c[2]) for c in corners]

    def paint(p: Painter) -> None:
        for model in sorted(models, key=lambda m: -_distance(pose, m)):
            _extrude(p, model, pose, draw)

    def shade(p: Painter) -> None:
        p.cast_shadow(footprint, top)
        p.touch(footprint)

    xs, zs = [c[0] for c in footprint], [c[1] for c in footprint]
    return Thing(min(xs), max(xs), min(zs), max(zs), paint, shade)


def _distance(pose: Pose, model: Model) -> float:
    middle = (min(a for a, _ in model.profile) + model.length) / 2
    x, _, z = pose.at(middle, 0, 0)
    return math.hypot(x, z)
