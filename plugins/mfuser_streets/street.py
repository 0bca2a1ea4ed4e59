"""The course of a road, and the city it runs through."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Street:
    """The road's course: its edges `left` < 0 < `right` about an axis that bends."""

    left: float
    right: float
    bend: float
    walk_left: float
    walk_right: float

    @property
    def tram(self) -> float:
        """Offset of the tram's track."""
        return self.left + 1.9

    def x(self, offset: float, z: float) -> float:
        """World x of what lies `offset` meters right of the axis, z meters ahead."""
        return offset + 0.5 * self.bend * z * z

    def heading(self, z: float, sign: float = 1.0) -> tuple[float, float]:
        slope = self.bend * z
        n = math.hypot(slope, 1.0)
        return sign * slope / n, sign / n


@dataclass(frozen=True)
class City:
    """The kind of city that the streets belong to. Ranges are drawn from, one number per street
    side or image."""

    urban: tuple[float, float] = (0.15, 0.75)
    """Share of the roadside that is built up to the sidewalk."""
    tall: tuple[float, float] = (4.0, 20.0)
    """Meters: the usual height of houses."""
    reach: float = 100.0
    """Meters ahead up to which the roadside is drawn in detail."""
    spacing: float = 1.0
    """Factor on the distance between lamps, signals and signs."""
    near: float = 1.0
    """Factor on the distance from the camera at which small things begin to stand."""
    stout: float = 1.0
    """Factor on the thickness of posts and frames and on the size of signals and signs."""
    crowd: float = 1.0
    """Factor on how many persons and two-wheelers there are."""
