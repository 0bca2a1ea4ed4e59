"""GTA5, "Playing for Data" (Richter et al., ECCV 2016): 24966 rendered images of 1914x1052."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import IGNORE, DatasetSpec, hookimpl
from mfuser.config.classes import CITYSCAPES
from mfuser.data.images import UnreadableImage, image_size
from mfuser_plugins.datasets._files import (
    CITYSCAPES_IDS,
    CONVERTED,
    TRAIN_IDS,
    LabelFiles,
    LabelMap,
    Pair,
    PairedSpec,
    pair_files,
    unsplit_folder,
)

LAYOUT = "images/00001.png and labels/00001.png"

VOID_COLORS = (
    (0, 0, 0),
    (111, 74, 0),
    (81, 0, 81),
    (250, 170, 160),
    (230, 150, 140),
    (180, 165, 180),
    (150, 100, 100),
    (150, 120, 90),
    (0, 0, 90),
    (0, 0, 110),
)
"""Cityscapes' colors of the ids that have no train id. (153, 153, 153) is pole and pole group,
(0, 0, 142) car and license plate: there the class that is trained wins."""

UNEQUAL = frozenset(
    f"{number:05d}"
    for number in (
        *(12160, 12166, 12167, 12191, 12192, 12193, 12195, 12202),
        *(12203, 12204, 12205, 12206, 12207, 12208, 19993),
    )
)
"""Images whose label has another size as published; the known splits leave them out."""


class GtaSpec(PairedSpec, name="gta"):
    """GTA5: streets rendered by a game, the usual synthetic source.

    Reads `images/` and `labels/` as unpacked: all of it is the train split, unless there are
    folders `train` and `val` below. Images published with a label of another size are left out.
    """

    official: ClassVar[Mapping[str, int]] = {"train": 24966}

    def pairs(self, root: Path, split: str) -> list[Pair]:
        images, part = unsplit_folder(self, root / "images", split)
        colors = {
            **dict.fromkeys(VOID_COLORS, IGNORE),
            **{color: i for i, color in enumerate(CITYSCAPES.colors)},
        }
        official = LabelMap(CITYSCAPES_IDS, colors=colors)
        # Some converters' instructions keep all labels in labels/train.
        folders = [root / "labels", root / "labels" / (part or "train")]
        pairs = pair_files(
            self,
            images,
            (".png", ".jpg"),
            [LabelFiles(folder, ".png", official) for folder in folders]
            + [LabelFiles(folder, CONVERTED, TRAIN_IDS) for folder in folders],
            LAYOUT,
        )
        return [pair for pair in pairs if not _unequal(pair)]


def _unequal(pair: Pair) -> bool:
    if pair.image.stem not in UNEQUAL:
        return False
    try:
        return image_size(pair.image) != image_size(pair.label)
    except UnreadableImage:
        return False  # said when it is read


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [GtaSpec]
