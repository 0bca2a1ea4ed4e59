"""Cityscapes (Cordts et al., CVPR 2016): 2975 training and 500 validation images of 2048x1024."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import Dataset, DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    CITYSCAPES_IDS,
    TRAIN_IDS,
    LabelFiles,
    LabelMap,
    PairedDataset,
    chosen_split,
    pair_files,
    require_root,
)

LAYOUT = (
    "leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png"
)


class CityscapesSpec(DatasetSpec, name="cityscapes"):
    """Cityscapes, finely annotated: real streets of German and Swiss cities by day.

    Reads `leftImg8bit/` and `gtFine/` as unpacked. Where the official `_labelIds.png` are absent,
    `_labelTrainIds.png` made by cityscapesScripts serve (the two differ at some object edges).
    """

    official: ClassVar[Mapping[str, int]] = {"train": 2975, "val": 500}

    def build(self, root: Path | None, split: str) -> Dataset:
        root = require_root(self, root)
        split = chosen_split(self, split)
        labels = root / "gtFine" / split
        pairs = pair_files(
            self,
            root / "leftImg8bit" / split,
            ("_leftImg8bit.png",),
            [
                LabelFiles(labels, "_gtFine_labelIds.png", LabelMap(CITYSCAPES_IDS)),
                LabelFiles(labels, "_gtFine_labelTrainIds.png", TRAIN_IDS),
            ],
            LAYOUT,
        )
        return PairedDataset(root, pairs, self.test_size)


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [CityscapesSpec]
