"""The roadside, from the houses to the curb."""

from __future__ import annotations

import numpy as np

from mfuser_streets import barriers, buildings, furniture, greenery
from mfuser_streets.chance import one_of, weighted
from mfuser_streets.geometry import Thing
from mfuser_streets.street import City, Street


def roadside(
    rng: np.random.Generator, street: Street, crossing: float | None, city: City
) -> list[Thing]:
    """Houses, walls, fences, hedges and trees along both sides."""
    things: list[Thing] = []
    for side, edge in ((-1, street.left - street.walk_left), (1, street.right + street.walk_right)):
        urban = rng.uniform(*city.urban)
        tall = rng.uniform(*city.tall)
        z = rng.uniform(1.0, 5.0)
        while z < city.reach:
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
    rng: np.random.Generator,
    near: tuple[float, float],
    far: tuple[float, float],
    side: int,
    urban: float,
    tall: float,
) -> list[Thing]:
    """The things between two points of the roadside."""

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
        things.append(buildings.building(rng, *behind(rng.uniform(0, 1.2)), side, height))
        return things
    set_back = rng.uniform(5, 11)
    if barrier < 0.27:
        things.append(barriers.wall(rng, near, far, side, rng.uniform(1.1, 2.8)))
    elif barrier < 0.56:
        sort = weighted(rng, ("boards", "lattice", "guardrail"), (0.42, 0.38, 0.2))
        things.append(barriers.fence(rng, near, far, side, rng.uniform(1.1, 2.1), sort))
    elif barrier < 0.68:
        things += greenery.hedge(rng, *behind(0.7), rng.uniform(1.0, 2.0))
    for _ in range(rng.integers(0, 4)):
        x, z = somewhere(rng.uniform(1.0, 4.0))
        sort = one_of(rng, ("round", "round", "tall", "conifer", "bush"))
        tree_height = rng.uniform(1.0, 2.0) if sort == "bush" else rng.uniform(4, 9)
        things.append(greenery.tree(rng, x, z, tree_height, sort))
    if rng.random() < 0.25 + 0.6 * urban:
        things.append(buildings.building(rng, *behind(set_back), side, min(height, 9.0)))
    return things


def street_furniture(
    rng: np.random.Generator, street: Street, crossing: float | None, city: City
) -> list[Thing]:
    """Lamps, signals, signs and street trees between road and sidewalk."""
    things: list[Thing] = []
    for side, edge, walk in (
        (-1, street.left, street.walk_left),
        (1, street.right, street.walk_right),
    ):
        z = rng.uniform(5.0, 10.0) * city.near
        avenue = walk > 2.2 and rng.random() < 0.35
        while z < 0.75 * city.reach:
            x = street.x(edge + side * rng.uniform(0.4, 0.8), z)
            clear = crossing is None or not crossing - 0.5 < z < crossing + 7.5
            what = weighted(
                rng, ("lamp", "signal", "sign", "utility", "none"), (0.27, 0.2, 0.33, 0.06, 0.14)
            )
            if clear and what == "lamp":
                things.append(furniture.lamp_post(rng, x, z, side))
            elif clear and what == "signal":
                things.append(furniture.traffic_light(rng, x, z, side))
            elif clear and what == "sign":
                sort = one_of(rng, furniture.SIGNS)
                things.append(furniture.traffic_sign(rng, x, z, sort))
            elif clear and what == "utility":
                things.append(furniture.utility_pole(rng, x, z))
            elif clear and avenue:
                things.append(greenery.tree(rng, x, z, rng.uniform(4.5, 7.5), "round"))
            z += rng.uniform(3.5, 12) * city.spacing
        if crossing is not None and rng.random() < 0.75:
            z = crossing - 1.2
            x = street.x(edge + side * 0.6, z)
            things.append(furniture.traffic_light(rng, x, z, side))
    return things
