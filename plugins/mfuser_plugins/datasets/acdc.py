"""ACDC (Sakaridis et al., ICCV 2021): fog, night, rain and snow, 1600 and 406 images, 1920x1080."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, get_args

from mfuser import DatasetSpec, hookimpl
from mfuser_plugins.datasets._conditions import ByCondition
from mfuser_plugins.datasets._files import (
    Pair,
    city_labels,
    pair_files,
)

Condition = Literal["fog", "night", "rain", "snow"]

LAYOUT = (
    "rgb_anon/<condition>/<split>/<sequence>/*_rgb_anon.png and "
    "gt/<condition>/<split>/<sequence>/*_gt_labelTrainIds.png"
)


class AcdcSpec(ByCondition, name="acdc"):
    """ACDC: Swiss streets in adverse conditions. As a target it is one domain per condition.

    condition: fog, night, rain or snow; none means all four.
    Reads `rgb_anon/` and `gt/` as unpacked; the clear-weather references (`<split>_ref`) are
    left out.
    """

    CONDITIONS: ClassVar[tuple[str, ...]] = get_args(Condition)

    condition: Condition | None = None

    def pairs(self, root: Path, split: str) -> list[Pair]:
        pairs = []
        for condition in self.chosen():
            labels = root / "gt" / condition / split
            pairs += pair_files(
                self,
                root / "rgb_anon" / condition / split,
                ("_rgb_anon.png",),
                city_labels(labels, "_gt"),
                LAYOUT,
            )
        return pairs

    def label(self) -> str:
        return "acdc" if self.condition is None else f"acdc:{self.condition}"


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [AcdcSpec]
