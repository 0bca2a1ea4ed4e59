"""MUSES (Brödermann et al., ECCV 2024): four weathers by day and night, 1920x1080.

1500 training and 250 validation images of the frame camera; the other sensors are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, get_args

from mfuser import DatasetSpec, hookimpl
from mfuser_plugins.datasets._conditions import ByCondition
from mfuser_plugins.datasets._files import (
    Pair,
    city_labels,
    pair_files,
)

Condition = Literal["clear", "fog", "rain", "snow"]
Time = Literal["day", "night"]

LAYOUT = (
    "frame_camera/<split>/<weather>/<day or night>/*_frame_camera.png and "
    "gt_semantic/<split>/<weather>/<day or night>/*_gt_labelTrainIds.png"
)


class MusesSpec(ByCondition, name="muses"):
    """MUSES: Swiss streets in four weathers. As a target it is one domain per weather.

    condition: clear, fog, rain or snow; none means all four.
    time: day or night; none means both.
    Reads `frame_camera/` and `gt_semantic/` as unpacked.
    """

    CONDITIONS: ClassVar[tuple[str, ...]] = get_args(Condition)
    official: ClassVar[Mapping[str, int]] = {"train": 1500, "val": 250}

    condition: Condition | None = None
    time: Time | None = None

    def pairs(self, root: Path, split: str) -> list[Pair]:
        pairs: list[Pair] = []
        for condition in self.chosen():
            part = Path(split, condition, self.time or "")
            labels = root / "gt_semantic" / part
            pairs += pair_files(
                self,
                root / "frame_camera" / part,
                ("_frame_camera.png",),
                city_labels(labels, "_gt"),
                LAYOUT,
            )
        return pairs

    def label(self) -> str:
        chosen = "-".join(part for part in (self.condition, self.time) if part)
        return f"muses:{chosen}" if chosen else "muses"


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [MusesSpec]
