"""Cityscapes (Cordts et al., CVPR 2016): 2975 training and 500 validation images of 2048x1024."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    CITYSCAPES_IDS,
    TRAIN_IDS,
    LabelFiles,
    LabelMap,
    Pair,
    PairedSpec,
    pair_files,
)

LAYOUT = (
    "leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_labelIds.png"
)


class CityscapesSpec(PairedSpec, name="cityscapes"):
    """Cityscapes, finely annotated: real streets of German and Swiss cities by day.

    Reads `leftImg8bit/` and `gtFine/` as unpacked. Where the official `_labelIds.png` are absent,
    `_labelTrainIds.png` made by cityscapesScripts serve (the two differ at some object edges).
    """

    official: ClassVar[Mapping[str, int]] = {"train": 2975, "val": 500}

    def pairs(self, root: Path, split: str) -> list[Pair]:
        labels = root / "gtFine" / split
        return pair_files(
            self,
            root / "leftImg8bit" / split,
            ("_leftImg8bit.png",),
            [
                LabelFiles(labels, "_gtFine_labelIds.png", LabelMap(CITYSCAPES_IDS)),
                LabelFiles(labels, "_gtFine_labelTrainIds.png", TRAIN_IDS),
            ],
            LAYOUT,
        )


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [CityscapesSpec]
