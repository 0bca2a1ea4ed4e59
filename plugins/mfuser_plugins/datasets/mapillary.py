"""Mapillary Vistas v1.2 (Neuhold et al., ICCV 2017): 18000 and 2000 images of many sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from mfuser import IGNORE, DataError, DatasetSpec, hookimpl
from mfuser.specs import Size
from mfuser_plugins.datasets._files import (
    CONVERTED,
    IMAGE_SUFFIXES,
    TRAIN_IDS,
    LabelFiles,
    LabelMap,
    Pair,
    PairedSpec,
    pair_files,
)

LAYOUT = (
    "validation/images/*.jpg and validation/labels/*.png, or validation/v1.2/labels/*.png; "
    "training/ alike"
)

NUM_LABELS = 66

COMMON = {
    **{2: 1, 3: 4, 6: 3, 13: 0, 15: 1, 17: 2, 19: 11, 20: 12, 21: 12, 22: 12, 24: 0, 27: 10},
    **{29: 9, 30: 8, 45: 5, 47: 5, 48: 6, 50: 7, 52: 18, 54: 15, 55: 13, 57: 17, 58: 16, 61: 14},
}
"""Label index -> train id where both mappings agree; the rest is ignored."""

MAPPINGS = {
    "dgss": {7: 0, 8: 0, 9: 1, 10: 0, 11: 1, 14: 0, 23: 0, 44: 5, 46: 7, 49: 7},
    "robustnet": {41: 0},
}

V12_START = ((165, 42, 42), (0, 192, 0), (196, 196, 196), (190, 153, 153), (180, 165, 180))
"""Palette of the first labels of v1.2: bird, ground animal, curb, fence, guard rail."""


class MapillarySpec(PairedSpec, name="mapillary"):
    """Mapillary Vistas v1.2 (66 labels): streets of six continents, all cameras and weathers.

    mapping: from the 66 labels to the 19 train ids. "dgss" (by name, as in the domain
        generalization papers since Rein) gives crosswalks, bike and service lanes, parking to
        road, curb cuts and pedestrian areas to sidewalk, street lights to pole, backs and frames
        of signs to traffic sign; "robustnet" ignores all these, and gives manholes to road.
    Figures under different mappings cannot be compared. Labels of v2.0 (124) are refused.
    """

    official: ClassVar[Mapping[str, int]] = {"train": 18000, "val": 2000}

    mapping: Literal["dgss", "robustnet"] = "dgss"
    test_size: Size | None = (2048, 1024)

    def pairs(self, root: Path, split: str) -> list[Pair]:
        folder = root / ("training" if split == "train" else "validation")
        ids = {**dict.fromkeys(range(NUM_LABELS), IGNORE), **COMMON, **MAPPINGS[self.mapping]}
        hint = "; Mapillary Vistas v2.0 has 124 labels, the v1.2 labels are needed"
        official = LabelMap(ids, hint=hint)
        plain, v12 = folder / "labels", folder / "v1.2" / "labels"
        if (folder / "v2.0").is_dir() and not (plain.is_dir() or v12.is_dir()):
            raise _version2(f"{folder / 'v2.0'} is there, {v12} is not")
        pairs = pair_files(
            self,
            folder / "images",
            IMAGE_SUFFIXES,
            [
                LabelFiles(v12, ".png", official),
                LabelFiles(plain, ".png", official),
                LabelFiles(plain, CONVERTED, TRAIN_IDS),
                LabelFiles(v12, CONVERTED, TRAIN_IDS),
            ],
            LAYOUT,
        )
        unsure = [p for p in pairs if p.decode is official and p.label.is_relative_to(plain)]
        if unsure:
            _check_version(root, unsure[0])
        return pairs


def _check_version(root: Path, pair: Pair) -> None:
    """Refuse v2.0 labels in a folder that does not tell the version by its name."""
    config = root / "config.json"
    if config.is_file():
        try:
            count = len(json.loads(config.read_text("utf-8"))["labels"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"mapillary: {config} has no list 'labels'; restore it from the dataset"
            ) from error
        if count != NUM_LABELS:
            raise _version2(f"{config} lists {count} labels")
        return
    colors = _palette(pair.label)
    # A gray palette says nothing; 124 colors that start otherwise are the other version's.
    beyond = [c for c in colors[NUM_LABELS:124] if c[0] != c[1] or c[1] != c[2]]
    if len(beyond) > 29 and tuple(colors[: len(V12_START)]) != V12_START:
        raise _version2(f"{pair.label} has the palette of another version")


def _palette(path: Path) -> list[tuple[int, ...]]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            values = (image.getpalette() or []) if image.mode == "P" else []
    except (OSError, SyntaxError, ValueError):
        return []  # said when it is read
    return [tuple(values[i : i + 3]) for i in range(0, len(values), 3)]


def _version2(reason: str) -> DataError:
    return DataError(
        f"mapillary: these are not the {NUM_LABELS} labels of Mapillary Vistas v1.2: {reason}. "
        "Labels of v2.0 (124) have no mapping to the 19 classes that published figures use: "
        "unpack the v1.2 labels (v1.2/labels in the archive)"
    )


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [MapillarySpec]
