"""Dark Zurich (Sakaridis et al., ICCV 2019): 50 labeled validation images by night, 1920x1080."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import Dataset, DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    PairedDataset,
    chosen_split,
    city_labels,
    pair_files,
    require_root,
)

LAYOUT = (
    "rgb_anon/val/night/<sequence>/*_rgb_anon.png and "
    "gt/val/night/<sequence>/*_gt_labelTrainIds.png"
)


class DarkZurichSpec(DatasetSpec, name="dark_zurich"):
    """Dark Zurich: streets of one city at night, a target only.

    Reads `rgb_anon/` and `gt/` as unpacked. Its training images have no labels, those of the test
    images are withheld; the clear-weather references (`val_ref`) are not part of it.
    """

    official: ClassVar[Mapping[str, int]] = {"val": 50}

    def build(self, root: Path | None, split: str) -> Dataset:
        root = require_root(self, root)
        split = chosen_split(self, split)
        labels = root / "gt" / split
        pairs = pair_files(
            self,
            root / "rgb_anon" / split,
            ("_rgb_anon.png",),
            city_labels(labels, "_gt"),
            LAYOUT,
        )
        return PairedDataset(root, pairs, self.test_size)


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [DarkZurichSpec]
