"""Road users: vehicles, persons, two-wheelers."""

from __future__ import annotations

import math

import numpy as np

from mfuser_streets import people, vehicles
from mfuser_streets.chance import one_of
from mfuser_streets.geometry import Thing
from mfuser_streets.street import City, Street


class _Plots:
    """Ground already taken: boxes (x0, x1, z0, z1)."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float, float, float]] = []

    def take(self, x: float, z: float, half_x: float, half_z: float) -> bool:
        box = x - half_x, x + half_x, z - half_z, z + half_z
        if any(
            box[0] < o[1] and o[0] < box[1] and box[2] < o[3] and o[2] < box[3] for o in self._taken
        ):
            return False
        self._taken.append(box)
        return True


_LENGTH = {"car": 4.6, "truck": 8.2, "bus": 11.4, "train": 22.2}


def traffic(
    rng: np.random.Generator, street: Street, crossing: float | None, tram: bool, city: City
) -> list[Thing]:
    """Vehicles in their lanes, on the crossing and at the curb; persons and two-wheelers."""
    things: list[Thing] = []
    plots = _Plots()

    def along(kind: str, offset: float, z: float, sign: float) -> None:
        length = _LENGTH[kind]
        x = street.x(offset, z)
        if plots.take(x, z, 1.5, length / 2 + 0.8):
            things.append(vehicles.vehicle(rng, kind, x, z, street.heading(z, sign)))

    def across(kind: str, x: float, z: float) -> None:
        if plots.take(x, z, _LENGTH[kind] / 2 + 0.8, 1.6):
            sign = one_of(rng, (-1.0, 1.0))
            tilt = rng.normal(0, 0.1)
            heading = sign * math.cos(tilt), math.sin(tilt)
            things.append(vehicles.vehicle(rng, kind, x, z, heading))

    left, right = street.left, street.right
    oncoming, ahead = left * 0.5 - 0.1, right * 0.5 + 0.1
    if tram and rng.random() < 0.85:
        along("train", street.tram, rng.uniform(20, 38), one_of(rng, (-1.0, 1.0)))
    elif rng.random() < 0.16:
        z = crossing + 4.0 if crossing is not None else rng.uniform(22, 34)
        across("train", rng.uniform(-9, 9), z)
    for kind, chance in (("bus", 0.38), ("truck", 0.5)):
        if rng.random() < chance:
            z = rng.uniform(10, 17) + 16 * rng.random() ** 2
            if rng.random() < 0.22:
                across(
                    kind, rng.uniform(-5, 5), crossing + 2.5 if crossing else rng.uniform(12, 26)
                )
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
    return things + _walkers(rng, street, plots, city) + _riders(rng, street, plots, city)


def _walkers(rng: np.random.Generator, street: Street, plots: _Plots, city: City) -> list[Thing]:
    things = []
    left, right = street.left, street.right
    for _ in range(round(city.crowd * int(rng.integers(1, 6)))):
        z = (rng.uniform(4.5, 9) + 22 * rng.random() ** 2) * city.near
        if rng.random() < 0.78:
            side, edge = (-1, left) if rng.random() < 0.5 else (1, right)
            walk = street.walk_left if side < 0 else street.walk_right
            offset = edge + side * (rng.uniform(0.5, walk - 0.5) if walk else -0.6)
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


def _riders(rng: np.random.Generator, street: Street, plots: _Plots, city: City) -> list[Thing]:
    things = []
    left, right = street.left, street.right
    for kind, chance in (("bicycle", 0.78), ("motorcycle", 0.74)):
        while rng.random() < chance:
            chance *= min(0.45 * city.crowd, 0.9)
            z = (rng.uniform(4.5, 8) + 12 * rng.random() ** 2) * city.near
            ridden = rng.random() < 0.7
            if ridden:
                offset = rng.uniform(left + 0.5, right - 0.5)
            else:
                side, edge = (-1, left) if rng.random() < 0.5 else (1, right)
                walk = street.walk_left if side < 0 else street.walk_right
                offset = edge + side * (rng.uniform(0.3, walk - 0.7) if walk else -0.5)
            turn = rng.uniform(0, 2 * math.pi)
            # A random angle pulled toward the road's own direction or straight across it.
            turn = turn + 0.18 * math.sin(4 * turn)
            x = street.x(offset, z)
            if plots.take(x, z, 0.9, 0.6):
                heading = math.sin(turn), math.cos(turn)
                things.append(people.two_wheeler(rng, kind, x, z, heading, ridden))
    return things
