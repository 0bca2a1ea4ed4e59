"""SYNTHIA-RAND-CITYSCAPES (Ros et al., CVPR 2016): 9400 rendered images of 1280x760."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import IGNORE, DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    CONVERTED,
    TRAIN_IDS,
    LabelFiles,
    LabelMap,
    Pair,
    PairedSpec,
    pair_files,
    unsplit_folder,
)

LAYOUT = "RGB/0000000.png and GT/LABELS/0000000.png"

IDS = {
    **dict.fromkeys(range(23), IGNORE),
    **{1: 10, 2: 2, 3: 0, 4: 1, 5: 4, 6: 8, 7: 5, 8: 13, 9: 7, 10: 11, 11: 18, 12: 17},
    **{15: 6, 16: 9, 17: 12, 18: 14, 19: 15, 20: 16, 21: 3},
}
"""Id -> train id; void (0), parking slot (13), road work (14), lane marking (22) are ignored."""

ABSENT = frozenset({9, 14, 16})
"""Terrain, truck and train have an id that no label uses."""


class SynthiaSpec(PairedSpec, name="synthia"):
    """SYNTHIA-RAND-CITYSCAPES: rendered streets with the classes of Cityscapes (16 of the 19).

    Reads `RGB/` and `GT/LABELS/` as unpacked (16-bit PNG, class in the red channel), also below
    `RAND_CITYSCAPES/`: all of it is the train split, unless there are folders `train` and `val`.
    """

    official: ClassVar[Mapping[str, int]] = {"train": 9400}
    nested: ClassVar[tuple[str, str]] = ("RGB", "RAND_CITYSCAPES")

    def pairs(self, root: Path, split: str) -> list[Pair]:
        images, part = unsplit_folder(self, root / "RGB", split)
        labels = root / "GT" / "LABELS"
        folders = [labels, labels / (part or "train")]
        official = LabelMap(IDS, channel=0)
        return pair_files(
            self,
            images,
            (".png",),
            [LabelFiles(folder, ".png", official) for folder in folders]
            + [LabelFiles(folder, CONVERTED, TRAIN_IDS) for folder in folders],
            LAYOUT,
        )

    def class_ids(self) -> Iterable[int]:
        return set(range(19)) - ABSENT


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [SynthiaSpec]
