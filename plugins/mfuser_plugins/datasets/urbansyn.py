"""UrbanSyn (Gómez et al., 2023, arXiv 2312.12176): 7539 rendered images of 2048x1024."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import IGNORE, DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    LabelFiles,
    LabelMap,
    Pair,
    PairedSpec,
    pair_files,
    unsplit_folder,
)

LAYOUT = "rgb/rgb_0001.png and ss/ss_0001.png"

IDS = {**{i: i for i in range(19)}, 19: IGNORE}
"""Cityscapes' train ids, and 19 for what is unlabeled."""


class UrbanSynSpec(PairedSpec, name="urbansyn"):
    """UrbanSyn: photorealistic rendered streets with the 19 classes of Cityscapes.

    Reads `rgb/` and `ss/` as published: all of it is the train split, unless there are folders
    `train` and `val` in both.
    """

    official: ClassVar[Mapping[str, int]] = {"train": 7539}

    def pairs(self, root: Path, split: str) -> list[Pair]:
        images, part = unsplit_folder(self, root / "rgb", split)
        return pair_files(
            self,
            images,
            (".png",),
            [LabelFiles(root / "ss" / part, ".png", LabelMap(IDS), ("rgb_", "ss_"))],
            LAYOUT,
        )


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [UrbanSynSpec]
