"""Persons on foot, and bicycles and motorcycles with and without a rider."""

from __future__ import annotations

import math

import numpy as np

from mfuser_streets.geometry import Draw, Painter, Point, Thing
from mfuser_streets.vehicles import Pose

_RING = [(math.cos(t * math.pi / 8), math.sin(t * math.pi / 8)) for t in range(16)]


def person(rng: np.random.Generator, x: float, z: float) -> Thing:
    """Somebody standing or walking, facing any way."""
    draws = rng.random((4, 3))
    height = rng.uniform(1.55, 1.9) if rng.random() < 0.85 else rng.uniform(1.05, 1.35)
    turn = rng.uniform(0, 2 * math.pi)
    stride = rng.uniform(0.05, 0.32)
    build = rng.uniform(0.9, 1.2)
    skirt, bag, long_hair = rng.random(3) < (0.2, 0.35, 0.4)

    def paint(p: Painter) -> None:
        _body(
            p,
            "person",
            (x, 0.0, z),
            height,
            turn,
            stride,
            build,
            draws,
            skirt=bool(skirt),
            bag=bool(bag),
            long_hair=bool(long_hair),
        )

    def shade(p: Painter) -> None:
        p.cast_shadow([(x - 0.2, z), (x + 0.2, z)], height)
        p.touch([(x - 0.3, z - 0.2), (x + 0.3, z - 0.2), (x + 0.3, z + 0.2), (x - 0.3, z + 0.2)])

    return Thing(x - 0.3, x + 0.3, z - 0.2, z + 0.2, paint, shade)


def _body(
    p: Painter,
    who: str,
    foot: Point,
    height: float,
    turn: float,
    stride: float,
    build: float,
    draws: np.ndarray,
    *,
    skirt: bool,
    bag: bool,
    long_hair: bool,
) -> None:
    """A figure at `foot`; `turn` 0 faces right, pi / 2 away from the camera."""
    x0, y0, z = foot
    across, along = abs(math.sin(turn)), math.cos(turn)
    h = height / 1.75

    def at(forward: float, up: float, side: float) -> Point:
        return x0 + h * (forward * along + side * across), y0 + h * up, z

    skin_draw, top_draw, legs_draw, bag_draw = draws
    legs = p.part(f"{who}_legs", foot, draw=legs_draw)
    far_leg = p.part(f"{who}_legs", foot, draw=legs_draw, tone=0.8)
    shoe = p.part(f"{who}_shoe", foot, draw=legs_draw)
    top = p.part(f"{who}_top", foot, draw=top_draw)
    far_arm = p.part(f"{who}_top", foot, draw=top_draw, tone=0.78)
    skin = p.part(f"{who}_skin", foot, draw=skin_draw)
    w = build
    for side, step, part in ((0.09, -stride, far_leg), (-0.09, stride, legs)):
        hip, knee = at(0, 0.88, side), at(0.6 * step + 0.05, 0.48, side)
        ankle = at(step, 0.08, side)
        p.limb(part, hip, knee, 0.1 * w * h, 0.075 * w * h)
        p.limb(part, knee, ankle, 0.075 * w * h, 0.05 * w * h)
        p.limb(shoe, ankle, at(step + 0.14, 0.05, side), 0.05 * h, 0.045 * h)
    if skirt:
        p.polygon(
            top,
            [
                at(-0.2 * w, 0.5, -0.16),
                at(-0.12 * w, 1.0, -0.08),
                at(0.12 * w, 1.0, 0.08),
                at(0.2 * w, 0.5, 0.16),
            ],
        )
    p.limb(far_arm, at(0, 1.38, 0.2 * w), at(0.8 * stride, 0.85, 0.24 * w), 0.06 * h, 0.045 * h)
    p.limb(top, at(0, 0.95, 0), at(0.02, 1.3, 0), 0.15 * w * h, 0.15 * w * h)
    p.limb(top, at(0, 1.36, -0.13 * w), at(0, 1.36, 0.13 * w), 0.09 * w * h, 0.09 * w * h)
    if bag:
        sack = p.part(f"{who}_bag", foot, draw=bag_draw)
        p.limb(sack, at(-0.2 * w, 1.05, 0), at(-0.19 * w, 1.3, 0), 0.11 * h, 0.1 * h)
    p.limb(top, at(0, 1.38, -0.2 * w), at(-0.8 * stride, 1.1, -0.24 * w), 0.06 * h, 0.05 * h)
    p.limb(
        skin,
        at(-0.8 * stride, 1.1, -0.24 * w),
        at(-0.3 * stride, 0.85, -0.24 * w),
        0.05 * h,
        0.045 * h,
    )
    _head(p, who, at(0.03, 1.62, 0), h, along, math.sin(turn), skin, skin_draw, long_hair)


def _head(
    p: Painter,
    who: str,
    center: Point,
    h: float,
    along: float,
    away: float,
    skin: int,
    draw: Draw,
    long_hair: bool,
) -> None:
    x, y, z = center
    p.limb(skin, (x, y - 0.22 * h, z), center, 0.055 * h, 0.06 * h)
    hair = p.part("helmet" if who == "rider" else f"{who}_hair", center, draw=draw[::-1])
    if away > 0.3:  # seen from behind
        p.disc(hair, (x, y + 0.02 * h, z), 0.125 * h, 0.9)
        if long_hair:
            p.limb(hair, center, (x, y - 0.16 * h, z), 0.11 * h, 0.1 * h)
        return
    p.disc(hair, (x - 0.03 * along * h, y + 0.035 * h, z), 0.125 * h, 0.92)
    p.disc(skin, (x + 0.03 * along * h, y - 0.015 * h, z), 0.1 * h, 0.82)
    if who == "rider":
        p.limb(
            hair,
            (x - 0.07 * h, y + 0.07 * h, z),
            (x + 0.07 * h, y + 0.07 * h, z),
            0.065 * h,
            0.065 * h,
        )


def two_wheeler(
    rng: np.random.Generator,
    kind: str,
    x: float,
    z: float,
    heading: tuple[float, float],
    ridden: bool,
) -> Thing:
    """A "bicycle" or "motorcycle"."""
    draws = rng.random((4, 3))
    frame = rng.random(3)
    length = 1.75 if kind == "bicycle" else 2.1
    pose = Pose(x, z, heading, length)

    def paint(p: Painter) -> None:
        if kind == "bicycle":
            _bicycle(p, pose, frame)
        else:
            _motorcycle(p, pose, frame)
        if ridden:
            _rider(p, pose, kind, draws)
        if kind == "motorcycle" and heading[1] < -0.5:
            p.disc(p.part("moto_head", pose.at(1.9, 0.95, 0)), pose.at(1.9, 0.95, 0), 0.11)

    half = length / 2
    ends = (
        (x - heading[0] * half, z - heading[1] * half),
        (x + heading[0] * half, z + heading[1] * half),
    )
    (xa, za), (xb, zb) = ends

    def shade(p: Painter) -> None:
        p.cast_shadow([(xa - 0.1, za), (xb + 0.1, zb)], 1.7 if ridden else 0.9)
        p.touch([(xa - 0.15, za), (xa + 0.15, za + 0.1), (xb + 0.15, zb), (xb - 0.15, zb + 0.1)])

    return Thing(
        min(xa, xb) - 0.25, max(xa, xb) + 0.25, min(za, zb) - 0.2, max(za, zb) + 0.2, paint, shade
    )


def _wheel(
    p: Painter, part: int, pose: Pose, along: float, radius: float, tire: float, thick: float
) -> None:
    """A ring in the plane of travel, `tire` its share of the radius, and its tread seen end-on."""
    ring = [pose.at(along + radius * c, radius + radius * s, 0) for c, s in _RING]
    if tire < 1:
        inner = radius * (1 - tire)
        ring_inner = [pose.at(along + inner * c, radius + inner * s, 0) for c, s in _RING]
        p.polygons(part, [ring, ring_inner])  # even-odd filling leaves the hole
        for c, s in _RING[:8:2]:
            p.limb(
                part,
                pose.at(along - inner * c, radius - inner * s, 0),
                pose.at(along + inner * c, radius + inner * s, 0),
                0.012,
                0.012,
            )
    else:
        p.polygon(part, ring)
    if abs(pose.heading[0]) < 0.75:
        p.limb(part, pose.at(along, 0.03, 0), pose.at(along, 2 * radius - 0.03, 0), thick, thick)


def _bicycle(p: Painter, pose: Pose, draw: np.ndarray) -> None:
    dark = p.part("bike_dark", pose.at(0.9, 0.5, 0), draw=draw)
    frame = p.part("bike_frame", pose.at(0.9, 0.5, 0), draw=draw)
    rear, front = pose.at(0.36, 0.36, 0), pose.at(1.4, 0.36, 0)
    pedals, seat, head = pose.at(0.78, 0.32, 0), pose.at(0.62, 0.86, 0), pose.at(1.22, 0.85, 0)
    for along in (0.36, 1.4) if pose.heading[1] < 0 else (1.4, 0.36):
        _wheel(p, dark, pose, along, 0.36, 0.24 * p.stout, 0.055 * p.stout)
    for a, b in (
        (rear, seat),
        (rear, pedals),
        (pedals, seat),
        (seat, head),
        (pedals, head),
        (head, front),
    ):
        p.limb(frame, a, b, 0.042 * p.stout, 0.042 * p.stout)
    p.limb(dark, pose.at(0.48, 0.95, 0), pose.at(0.76, 0.95, 0), 0.055, 0.045)
    p.limb(dark, pose.at(1.18, 1.02, -0.28), pose.at(1.18, 1.02, 0.28), 0.035, 0.035)
    p.limb(dark, head, pose.at(1.18, 1.02, 0), 0.03, 0.03)


def _motorcycle(p: Painter, pose: Pose, draw: np.ndarray) -> None:
    middle = pose.at(1.0, 0.6, 0)
    dark = p.part("moto_dark", middle, draw=draw)
    paint = p.part("moto_paint", middle, draw=draw)
    chrome = p.part("moto_chrome", middle, draw=draw)
    for along in (0.35, 1.72) if pose.heading[1] < 0 else (1.72, 0.35):
        _wheel(p, dark, pose, along, 0.33, 1.0, 0.1)
        hub = pose.at(along, 0.33, 0)
        p.polygon(chrome, [pose.at(along + 0.15 * c, 0.33 + 0.15 * s, 0) for c, s in _RING])
        p.disc(dark, hub, 0.04)
    p.limb(dark, pose.at(0.7, 0.42, 0), pose.at(1.2, 0.42, 0), 0.2, 0.2)
    p.limb(chrome, pose.at(0.15, 0.35, 0.1), pose.at(0.95, 0.3, 0.1), 0.06, 0.04)
    p.limb(paint, pose.at(0.15, 0.75, 0), pose.at(0.8, 0.72, 0), 0.09, 0.14)
    p.limb(paint, pose.at(0.95, 0.8, 0), pose.at(1.35, 0.85, 0), 0.17, 0.14)
    p.limb(dark, pose.at(0.25, 0.86, 0), pose.at(0.85, 0.84, 0), 0.07, 0.07)
    p.limb(chrome, pose.at(1.5, 0.95, 0), pose.at(1.72, 0.35, 0), 0.05, 0.05)
    p.limb(paint, pose.at(1.45, 0.8, 0), pose.at(1.62, 1.05, 0), 0.13, 0.1)
    p.limb(dark, pose.at(1.42, 1.1, -0.32), pose.at(1.42, 1.1, 0.32), 0.04, 0.04)
    if pose.heading[1] > 0.5:
        p.disc(p.part("moto_tail", pose.at(0.0, 0.78, 0)), pose.at(0.0, 0.78, 0), 0.07)


def _rider(p: Painter, pose: Pose, kind: str, draws: np.ndarray) -> None:
    skin_draw, top_draw, legs_draw, bag_draw = draws
    foot = pose.at(0.8, 0.5, 0)
    legs = p.part("rider_legs", foot, draw=legs_draw)
    top = p.part("rider_top", foot, draw=top_draw)
    far = p.part("rider_top", foot, draw=top_draw, tone=0.78)
    skin = p.part("rider_skin", foot, draw=skin_draw)
    shoe = p.part("rider_shoe", foot, draw=legs_draw)
    up = 0.97 if kind == "bicycle" else 0.92
    hips, grip = pose.at(0.62, up, 0), (1.18 if kind == "bicycle" else 1.4)
    neck = pose.at(0.9, up + 0.52, 0)
    for side in (-0.12, 0.12):
        knee = pose.at(1.02 - side, up - 0.28 + side, 2 * side)
        ankle = pose.at(0.85 - 2 * side, 0.35 + side, 1.3 * side)
        p.limb(legs, pose.at(0.62, up, side), knee, 0.1, 0.075)
        p.limb(legs, knee, ankle, 0.075, 0.055)
        p.limb(shoe, ankle, pose.at(0.98 - 2 * side, 0.3 + side, 1.3 * side), 0.055, 0.05)
    p.limb(far, pose.at(0.9, up + 0.45, 0.18), pose.at(grip, 1.08, 0.25), 0.06, 0.05)
    p.limb(top, hips, neck, 0.15, 0.17)
    p.limb(top, pose.at(0.88, up + 0.47, -0.15), pose.at(0.88, up + 0.47, 0.15), 0.09, 0.09)
    if bag_draw[2] < 0.3:
        sack = p.part("rider_bag", foot, draw=bag_draw)
        p.limb(sack, pose.at(0.55, up + 0.2, 0), pose.at(0.72, up + 0.45, 0), 0.12, 0.11)
    p.limb(top, pose.at(0.9, up + 0.45, -0.18), pose.at(grip - 0.15, 1.12, -0.25), 0.06, 0.055)
    p.limb(skin, pose.at(grip - 0.15, 1.12, -0.25), pose.at(grip, 1.08, -0.25), 0.05, 0.05)
    _head(
        p,
        "rider",
        pose.at(1.0, up + 0.76, 0),
        1.0,
        pose.heading[0],
        pose.heading[1],
        skin,
        skin_draw,
        False,
    )
