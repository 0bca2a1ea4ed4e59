"""WildDash 2 (Zendel et al., "Unifying Panoptic Segmentation for Autonomous Driving", CVPR 2022).

4256 public frames of many cameras and countries, 1920x1080, with COCO panoptic labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mfuser import IGNORE, DataError, DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    IMAGE_SUFFIXES,
    LabelFiles,
    LabelMap,
    Pair,
    PairedSpec,
    pair_files,
    unsplit_folder,
)
from mfuser_plugins.datasets._folder_maps import PanopticMap

LAYOUT = "images/*.jpg and panoptic/*.png with panoptic.json, or labels/*.png of category ids"

IDS = {
    **dict.fromkeys(range(81), IGNORE),
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12},
    **{26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18, 34: 14, 35: 13, 38: 0, 41: 0, 43: 0},
    **{45: 5, 46: 5, 47: 12, 48: 12, 49: 12, 52: 1, 56: 3, 58: 17, 61: 0, 64: 0, 65: 1, 70: 0},
    **{74: 0, 75: 0, 76: 0, 77: 1, 78: 9, 79: 0, 80: 1},
    IGNORE: IGNORE,
}
"""Category id -> train id, by the authors' unified label policy (table 1 of the supplement;
wd2_unified_label_policy.json of ozendelait/wilddash_scripts): pickups are trucks, vans cars,
auto-rickshaws motorcycles; curbs and curb cuts sidewalk; lane markings, manholes, tram tracks,
crosswalks, bike and service lanes and pedestrian areas road; other barriers wall, frames of signs
pole. Street lights and backs of signs are ignored."""


class WildDash2Spec(PairedSpec, name="wilddash2"):
    """WildDash 2: dash cameras all over the world, picked for what is hard about them.

    Reads `images/` with `panoptic/` and `panoptic.json` as published, or with `labels/` of an older
    release; also `*_labelIds.png` in `labels/`, as the authors' pano2sem.py writes them. All of it
    is the train split, unless there are folders `images/train` and `images/val`.
    """

    official: ClassVar[Mapping[str, int]] = {"train": 4256}

    def pairs(self, root: Path, split: str) -> list[Pair]:
        images, part = unsplit_folder(self, root / "images", split)
        labels, document = root / "labels" / part, root / "panoptic.json"
        official = LabelMap(IDS)
        choices = [
            LabelFiles(labels, ".png", official),
            LabelFiles(labels, "_labelIds.png", official),
        ]
        if document.is_file():
            panoptic = segments(document)
            choices[:0] = [
                LabelFiles(folder, ".png", panoptic)
                for folder in dict.fromkeys((root / "panoptic", root / "panoptic" / part))
            ]
        return pair_files(self, images, IMAGE_SUFFIXES, choices, LAYOUT)


def segments(path: Path) -> PanopticMap:
    """Train id of every segment of every mask in panoptic.json. Raises DataError."""
    try:
        annotations = json.loads(path.read_text("utf-8"))["annotations"]
        return PanopticMap(
            {
                mask["file_name"]: {s["id"]: IDS[s["category_id"]] for s in mask["segments_info"]}
                for mask in annotations
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"wilddash2: {path} is not the published panoptic.json ({type(error).__name__}: "
            f"{error}); restore it from the dataset"
        ) from error


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [WildDash2Spec]
