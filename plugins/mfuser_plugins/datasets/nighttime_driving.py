"""Nighttime Driving (Dai and Van Gool, ITSC 2018): 50 coarsely labeled images, 1920x1080."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import Dataset, DatasetSpec, hookimpl
from mfuser.errors import NoSplitError
from mfuser_plugins.datasets._files import (
    PairedDataset,
    chosen_split,
    city_labels,
    pair_files,
    require_root,
)

IMAGES, LABELS = "leftImg8bit/test/night", "gtCoarse_daytime_trainvaltest/test/night"
LAYOUT = f"{IMAGES}/*_leftImg8bit.png and {LABELS}/*_gtCoarse_labelTrainIds.png"


class NighttimeDrivingSpec(DatasetSpec, name="nighttime_driving"):
    """Nighttime Driving: streets at night, a target only.

    Reads `leftImg8bit/` and `gtCoarse_daytime_trainvaltest/` as unpacked, also below
    `NighttimeDrivingTest/`. The published test images serve as val; there is no train split.
    """

    official: ClassVar[Mapping[str, int]] = {"val": 50}

    def build(self, root: Path | None, split: str) -> Dataset:
        root = require_root(self, root)
        if chosen_split(self, split) == "train":
            raise NoSplitError(
                "nighttime_driving: the split 'train' does not exist: the dataset consists of 50 "
                "test images, which are its val split"
            )
        if not (root / "leftImg8bit").is_dir() and (root / "NighttimeDrivingTest").is_dir():
            root = root / "NighttimeDrivingTest"
        pairs = pair_files(
            self,
            root / IMAGES,
            ("_leftImg8bit.png",),
            city_labels(root / LABELS, "_gtCoarse"),
            LAYOUT,
        )
        return PairedDataset(root, pairs, self.test_size)


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [NighttimeDrivingSpec]
