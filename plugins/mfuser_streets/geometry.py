"""The camera, the map of part numbers, and the order in which things hide one another.

World: meters, x to the right, y up from the road, z away from the camera, which stands at
(0, height, 0) and looks along z. Every flat piece that is drawn is a *part*: a row in a table
(material, plane, normal, color draw) and a number in the map. As each part keeps its plane, the
depth of every pixel is exact: 1 / z is linear in the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np

from mfuser_streets import materials

Point = tuple[float, float, float]
Vector = tuple[float, float, float]

FACING: Vector = (0.0, 0.0, -1.0)
UP: Vector = (0.0, 1.0, 0.0)
NEAR = 0.4
"""Meters; what is closer is cut off."""
FAR = 400.0
OVERHANG = 2.0
"""Meters that a crown or an arm may reach beyond the ground its thing stands on."""

CIRCLE = np.exp(2j * np.pi * np.arange(16) / 16)
_ROUND = [(float(c.real), float(c.imag)) for c in CIRCLE]
_HALF = [complex(c) for c in CIRCLE[4:13:2]]

Draw: TypeAlias = "Sequence[float] | np.ndarray"
"""Three numbers in [0, 1] that pick an object's color."""
MIDDLE = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Camera:
    """height: meters above the road. focal: in image heights. horizon: its row, 0 top to 1 bottom.

    center: the column it looks along, 0 left to 1 right.
    """

    height: float
    focal: float
    horizon: float
    center: float


@dataclass
class Scene:
    """A drawn street, yet without color.

    ids: (H * supersample, W * supersample) int32, the part seen there. Per part: material, plane
    (n, 3) so that 1 / z = plane . (a, b, 1) at image tangents a (right), b (up), normal (n, 3),
    draw (n, 3) uniform in [0, 1] for its object's color, tone (n) a brightness factor.
    shadow, contact: (H, W) uint8, where the sun and where the sky is hidden from the ground.
    sun: unit vector toward it.
    """

    camera: Camera
    supersample: int
    ids: np.ndarray
    material: np.ndarray
    plane: np.ndarray
    normal: np.ndarray
    draw: np.ndarray
    tone: np.ndarray
    shadow: np.ndarray
    contact: np.ndarray
    sun: Vector

    def pixels(self) -> np.ndarray:
        """(H, W): the part at the middle of each pixel."""
        k = self.supersample
        return np.ascontiguousarray(self.ids[k // 2 :: k, k // 2 :: k])

    def label(self) -> np.ndarray:
        """(H, W) int64, train ids."""
        return materials.LABEL[self.material].take(self.pixels())


class Painter:
    """Draws parts into the map, each over what is there."""

    def __init__(
        self,
        camera: Camera,
        size: tuple[int, int],
        supersample: int,
        sun: Vector,
        stout: float = 1.0,
    ) -> None:
        self.camera = camera
        self.stout = stout
        self.sun = sun
        self.supersample = supersample
        self.height, self.width = size[0] * supersample, size[1] * supersample
        self.ids = np.zeros((self.height, self.width), np.int32)
        self.shadow = np.zeros(size, np.uint8)
        self.contact = np.zeros(size, np.uint8)
        self._f = camera.focal * self.height
        self._cx = camera.center * self.width
        self._cy = camera.horizon * self.height
        self._parts: list[tuple[float, ...]] = []
        self.part("sky", (0.0, 0.0, FAR), FACING)

    def scene(self) -> Scene:
        table = np.array(self._parts, np.float32)
        return Scene(
            self.camera,
            self.supersample,
            self.ids,
            table[:, 0].astype(np.int64),
            table[:, 1:4],
            table[:, 4:7],
            table[:, 7:10],
            table[:, 10],
            self.shadow,
            self.contact,
            self.sun,
        )

    def part(
        self,
        material: str,
        point: Point,
        normal: Vector = FACING,
        draw: Draw = MIDDLE,
        tone: float = 1.0,
    ) -> int:
        """A new part on the plane through `point`; `normal` (unit) points to its visible side."""
        nx, ny, nz = normal
        d = nx * point[0] + ny * (point[1] - self.camera.height) + nz * point[2]
        if abs(d) < 1e-3:  # seen edge-on: as a sprite at its depth
            plane = (0.0, 0.0, 1.0 / max(point[2], NEAR))
        else:
            plane = (nx / d, ny / d, nz / d)
        row = (materials.INDEX[material], *plane, *normal, draw[0], draw[1], draw[2], tone)
        self._parts.append(row)
        return len(self._parts) - 1

    def leaves(
        self, sorts: Sequence[str], point: Point, draw: Draw, tones: Sequence[float]
    ) -> list[int]:
        """Parts on one plane through `point` that faces the camera: material and tone of each."""
        first = self.part(sorts[0], point, FACING, draw, tones[0])
        shared = self._parts[first][1:-1]
        index = materials.INDEX
        for sort, tone in zip(sorts[1:], tones[1:], strict=True):
            self._parts.append((index[sort], *shared, tone))
        return list(range(first, len(self._parts)))

    def faces_camera(self, point: Point, normal: Vector) -> bool:
        return (
            normal[0] * point[0]
            + normal[1] * (point[1] - self.camera.height)
            + normal[2] * point[2]
            < 0
        )

    def pixel(self, point: Point) -> tuple[float, float]:
        """Where a point in front of the camera lands in the map, (column, row)."""
        s = self._f / point[2]
        return self._cx + s * point[0], self._cy + s * (self.camera.height - point[1])

    def outline(self, points: Sequence[Point], scale: float = 1.0) -> np.ndarray | None:
        """A polygon in space -> int32 pixels (n, 2), cut at the near plane; None if nothing left.

        `scale`: of the target image, relative to the map.
        """
        if min([p[2] for p in points]) < NEAR:
            points = _clip_near(points)
            if len(points) < 3:
                return None
        f, cx, cy, h = self._f * scale, self._cx * scale, self._cy * scale, self.camera.height
        flat = [c for x, y, z in points for c in (cx + f * x / z, cy + f * (h - y) / z)]
        return np.array(flat, np.float64).astype(np.int32).reshape(-1, 2)

    def polygon(self, part: int, points: Sequence[Point]) -> None:
        outline = self.outline(points)
        if outline is not None:
            cv2.fillPoly(self.ids, [outline], part)

    def polygons(self, part: int, many: Sequence[Sequence[Point]] | np.ndarray) -> None:
        """Polygons (n, corners, 3) that do not overlap, all with as many corners."""
        if len(many) == 0:
            return
        points = np.asarray(many, np.float64)
        z = points[..., 2]
        if z.min() < NEAR:
            outlines = [o for o in map(self.outline, points.tolist()) if o is not None]
        else:
            scale = self._f / z
            pixels = np.empty((*z.shape, 2), np.int32)
            pixels[..., 0] = self._cx + scale * points[..., 0]
            pixels[..., 1] = self._cy + scale * (self.camera.height - points[..., 1])
            outlines = list(pixels)
        if outlines:
            cv2.fillPoly(self.ids, outlines, part)

    def face(
        self,
        material: str,
        points: Sequence[Point],
        normal: Vector,
        draw: Draw = MIDDLE,
        tone: float = 1.0,
    ) -> None:
        """One polygon with its own part."""
        self.polygon(self.part(material, points[0], normal, draw, tone), points)

    def blobs(
        self, parts: Sequence[int], x: np.ndarray, y: np.ndarray, z: float, outlines: np.ndarray
    ) -> None:
        """Outlines (n, corners) facing the camera at x, y (n,), each over the ones before it.

        Complex meters about the center: real right, imaginary down.
        """
        s = self._f / z
        centers = (self._cx + s * x) + 1j * (self._cy + s * (self.camera.height - y))
        pixels = (outlines * s + centers[:, None]).view(np.float64).astype(np.int32)
        for part, outline in zip(parts, pixels.reshape(len(parts), -1, 2), strict=True):
            cv2.fillPoly(self.ids, [outline], part)

    def disc(self, part: int, center: Point, radius: float, squeeze: float = 1.0) -> None:
        """A disc facing the camera; `squeeze`: its width over its height."""
        x, y = self.pixel(center)
        r = self._f / center[2] * radius
        self._fill(part, CIRCLE.real * (r * squeeze) + CIRCLE.imag * (r * 1j) + complex(x, y))

    def limb(self, part: int, start: Point, end: Point, r0: float, r1: float) -> None:
        """A rounded, tapering stick between two points, radii in meters."""
        a, b = complex(*self.pixel(start)), complex(*self.pixel(end))
        along = b - a
        length = abs(along)
        unit = along / length if length else 1.0
        back = unit * (r0 * self._f / start[2])  # half a circle behind the start, one ahead
        ahead = unit * (r1 * self._f / end[2])
        self._fill(part, np.array([a + back * c for c in _HALF] + [b - ahead * c for c in _HALF]))

    def _fill(self, part: int, outline: np.ndarray) -> None:
        """`outline`: complex pixels (n,)."""
        pixels = outline.view(np.float64).astype(np.int32).reshape(-1, 2)
        cv2.fillPoly(self.ids, [pixels], part)

    def cast_shadow(self, footprint: Sequence[tuple[float, float]], top: float) -> None:
        """The ground that a block over `footprint` (x, z), `top` meters high, shades."""
        sx, sy, sz = self.sun
        dx, dz = -sx / sy * top, -sz / sy * top
        points = [*footprint, *((x + dx, z + dz) for x, z in footprint)]
        hull = cv2.convexHull(np.array(points, np.float32))[:, 0]
        self._mask(self.shadow, [(float(x), 0.0, float(z)) for x, z in hull])

    def drop_shadow(self, x: float, y: float, z: float, radius: float) -> None:
        """The shadow of a ball."""
        sx, sy, sz = self.sun
        x, z = x - sx / sy * y, z - sz / sy * y
        self._mask(self.shadow, [(x + radius * c, 0.0, z + radius * s) for c, s in _ROUND])

    def touch(self, footprint: Sequence[tuple[float, float]]) -> None:
        """The dark where something stands."""
        self._mask(self.contact, [(x, 0.0, z) for x, z in footprint])

    def _mask(self, mask: np.ndarray, points: Sequence[Point]) -> None:
        outline = self.outline(points, 1.0 / self.supersample)
        if outline is not None:
            cv2.fillPoly(mask, [outline], 255)


def _clip_near(points: Sequence[Point]) -> list[Point]:
    """Sutherland and Hodgman (1974) at z = NEAR."""
    kept: list[Point] = []
    for (x0, y0, z0), (x1, y1, z1) in zip(points, [*points[1:], points[0]], strict=True):
        if z0 >= NEAR:
            kept.append((x0, y0, z0))
        if (z0 >= NEAR) != (z1 >= NEAR):
            t = (NEAR - z0) / (z1 - z0)
            kept.append((x0 + t * (x1 - x0), y0 + t * (y1 - y0), NEAR))
    return kept


@dataclass(frozen=True)
class Thing:
    """Something that stands in the street: its extent on the ground, how to draw it and its shadow.

    Neither may draw random numbers: the order of drawing would change the scene.
    """

    x0: float
    x1: float
    z0: float
    z1: float
    paint: Callable[[Painter], None]
    shade: Callable[[Painter], None] | None = None


def painters_order(things: Sequence[Thing]) -> list[int]:
    """Indices so that what is hidden comes before what hides it.

    Only things in one direction can hide each other. Of two boxes on the ground that a line x = c
    or z = c separates, the one on the camera's side hides the other. Boxes that overlap, as
    slanting things may: the one nearer to the axis hides the other on its side. A cycle is broken
    where it breaks the fewest of these rules.
    """
    n = len(things)
    if n == 0:
        return []
    x0, x1, z0, z1 = np.array([(t.x0, t.x1, t.z0, t.z1) for t in things]).T
    # Slanting things in a row, such as houses along a bend, overlap by a corner.
    slack_x = 0.25 * np.minimum.outer(x1 - x0, x1 - x0)
    slack_z = 0.25 * np.minimum.outer(z1 - z0, z1 - z0)
    z_behind = z0[:, None] >= z1[None] - slack_z
    z_apart = z_behind | z_behind.T
    x_right = x0[:, None] >= x1[None] - slack_x
    x_apart = x_right | x_right.T
    x_behind = (x_right & (x1[None] > 0)) | (x_right.T & (x0[None] < 0))
    middle = (x0 + x1) / 2
    same_side = middle[:, None] * middle[None] > 0
    further_out = abs(middle)[:, None] > abs(middle)[None]
    mingled = np.where(same_side, further_out, z1[:, None] > z1[None])
    behind = np.where(z_apart, z_behind, np.where(x_apart, x_behind, mingled))
    left = np.minimum((x0 - OVERHANG) / np.maximum(z0, NEAR), (x0 - OVERHANG) / z1)
    right = np.maximum((x1 + OVERHANG) / np.maximum(z0, NEAR), (x1 + OVERHANG) / z1)
    behind &= (left[:, None] < right[None]) & (left[None] < right[:, None])
    np.fill_diagonal(behind, False)
    # Farthest first, so that the first of those that wait for the fewest is the farthest of them.
    farthest = np.argsort(-z1, kind="stable")
    behind = behind[farthest][:, farthest].astype(np.int32)
    waits_for = behind.sum(0, dtype=np.int32)  # how many must be drawn before each
    order = []
    for _ in range(n):
        i = int(waits_for.argmin())
        waits_for -= behind[i]
        waits_for[i] = 1 << 30  # drawn
        order.append(int(farthest[i]))
    return order
