"""The course of a road."""

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
