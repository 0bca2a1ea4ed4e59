"""BDD100K's semantic set (Yu et al., CVPR 2020): 7000 and 1000 images of 1280x720."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import DataError, DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    IMAGE_SUFFIXES,
    TRAIN_IDS,
    LabelFiles,
    Pair,
    PairedSpec,
    pair_files,
)

LAYOUT = "images/10k/<split>/*.jpg and labels/sem_seg/masks/<split>/*.png (or colormaps)"


class Bdd100kSpec(PairedSpec, name="bdd100k"):
    """BDD100K, the 10K set with semantic labels: American streets, all weathers, day and night.

    Reads `images/10k/` with `labels/sem_seg/masks/` or `colormaps/` (palette PNG whose index is
    the train id), and the older releases `seg/{images,labels}/` and `{images,labels}/<split>/`.
    """

    official: ClassVar[Mapping[str, int]] = {"train": 7000, "val": 1000}
    nested: ClassVar[tuple[str, str]] = ("images", "bdd100k")

    def pairs(self, root: Path, split: str) -> list[Pair]:
        labels = root / "labels"
        layouts = [
            (root / "images" / "10k", [labels / "sem_seg" / "masks",
                                       labels / "sem_seg" / "colormaps"]),
            (root / "seg" / "images", [root / "seg" / "labels"]),
            (root / "images", [labels]),
        ]  # fmt: skip
        images, folders = next(
            ((i, f) for i, f in layouts if (i / split).is_dir()),
            next(((i, f) for i, f in layouts if i.is_dir()), layouts[0]),
        )
        other = "train" if split == "val" else "val"
        if not (images / split).is_dir() and (images / other).is_dir():
            raise DataError(
                f"bdd100k: the folder {images / split} does not exist, {images / other} does; set "
                f'split = "{other}" to use that'
            )
        return pair_files(
            self,
            images / split,
            IMAGE_SUFFIXES,
            [
                LabelFiles(folder / split, suffix, TRAIN_IDS)
                for folder in folders
                for suffix in (".png", "_train_id.png")
            ],
            LAYOUT,
        )


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [Bdd100kSpec]
