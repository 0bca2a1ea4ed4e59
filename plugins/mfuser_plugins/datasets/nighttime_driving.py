"""Nighttime Driving (Dai and Van Gool, ITSC 2018): 50 coarsely labeled images, 1920x1080."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import DatasetSpec, hookimpl
from mfuser.errors import NoSplitError
from mfuser_plugins.datasets._files import (
    Pair,
    PairedSpec,
    city_labels,
    pair_files,
)

IMAGES, LABELS = "leftImg8bit/test/night", "gtCoarse_daytime_trainvaltest/test/night"
LAYOUT = f"{IMAGES}/*_leftImg8bit.png and {LABELS}/*_gtCoarse_labelTrainIds.png"


class NighttimeDrivingSpec(PairedSpec, name="nighttime_driving"):
    """Nighttime Driving: streets at night, a target only.

    Reads `leftImg8bit/` and `gtCoarse_daytime_trainvaltest/` as unpacked, also below
    `NighttimeDrivingTest/`. The published test images serve as val; there is no train split.
    """

    official: ClassVar[Mapping[str, int]] = {"val": 50}
    nested: ClassVar[tuple[str, str]] = ("leftImg8bit", "NighttimeDrivingTest")

    def pairs(self, root: Path, split: str) -> list[Pair]:
        if split == "train":
            raise NoSplitError(
                "nighttime_driving: the split 'train' does not exist: the dataset consists of 50 "
                "test images, which are its val split"
            )
        return pair_files(
            self,
            root / IMAGES,
            ("_leftImg8bit.png",),
            city_labels(root / LABELS, "_gtCoarse"),
            LAYOUT,
        )


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [NighttimeDrivingSpec]
