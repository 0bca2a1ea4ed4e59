"""Dark Zurich (Sakaridis et al., ICCV 2019): 50 labeled validation images by night, 1920x1080."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    Pair,
    PairedSpec,
    city_labels,
    pair_files,
)

LAYOUT = (
    "rgb_anon/val/night/<sequence>/*_rgb_anon.png and "
    "gt/val/night/<sequence>/*_gt_labelTrainIds.png"
)


class DarkZurichSpec(PairedSpec, name="dark_zurich"):
    """Dark Zurich: streets of one city at night, a target only.

    Reads `rgb_anon/` and `gt/` as unpacked. Its training images have no labels, those of the test
    images are withheld; the clear-weather references (`val_ref`) are not part of it.
    """

    official: ClassVar[Mapping[str, int]] = {"val": 50}

    def pairs(self, root: Path, split: str) -> list[Pair]:
        labels = root / "gt" / split
        return pair_files(
            self,
            root / "rgb_anon" / split,
            ("_rgb_anon.png",),
            city_labels(labels, "_gt"),
            LAYOUT,
        )


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [DarkZurichSpec]
