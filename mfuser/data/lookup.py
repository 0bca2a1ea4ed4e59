"""From the 8-bit values of a label to others, in one pass over its bytes."""

from __future__ import annotations

import numpy as np


class ByteTable:
    """A table of 256 values; those that it lacks are errors.

    table: (256,) integers, what each byte becomes (0 to 255); negative where there is none.
    """

    def __init__(self, table: np.ndarray) -> None:
        lacking = table < 0
        spare = np.setdiff1d(np.arange(256), table[~lacking])
        # Where an entry is lacking, the others cannot take up all 256 values.
        self._missing = int(spare[0]) if lacking.any() else None
        self._table = np.where(lacking, self._missing or 0, table).astype(np.uint8)

    def __call__(self, label: np.ndarray) -> np.ndarray | None:
        """uint8 (H, W) -> uint8 (H, W); None where it holds a value that the table lacks."""
        import cv2

        if not label.size:
            return label.copy()
        mapped: np.ndarray = cv2.LUT(label, self._table)
        if self._missing is not None and (mapped == self._missing).any():
            return None
        return mapped
