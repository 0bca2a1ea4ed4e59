"""IDD, the India Driving Dataset (Varma et al., WACV 2019): labels as polygons, masks by its kit.

The kit (AutoNUE/public-code) draws the polygons as PNG masks in one of several encodings:
`createLabels.py --datadir IDD --id-type csTrainId`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mfuser import IGNORE, DatasetSpec, hookimpl
from mfuser_plugins.datasets._files import (
    TRAIN_IDS,
    LabelFiles,
    LabelMap,
    Pair,
    PairedSpec,
    pair_files,
)

Encoding = Literal["csTrainId", "id", "level3Id"]

LAYOUT = (
    "leftImg8bit/<split>/<drive>/*_leftImg8bit.png and gtFine/<split>/<drive>/"
    "*_gtFine_labelcsTrainIds.png, which the kit's createLabels.py --id-type csTrainId makes"
)

IDS = {
    **dict.fromkeys(range(40), IGNORE),
    **{0: 0, 3: 1, 5: 9, 6: 11, 8: 12, 9: 17, 10: 18, 12: 13, 13: 14, 14: 15, 17: 16, 20: 3, 21: 4},
    **{24: 7, 25: 6, 26: 5, 29: 2, 32: 8, 33: 10},
    IGNORE: IGNORE,
}
"""Id -> train id, the column csTrainId of the kit's anue_labels.py: "non-drivable fallback" (5) is
terrain; auto-rickshaws, curbs, billboards, guard rails and the fallbacks are ignored."""

LEVEL3 = {
    **dict.fromkeys(range(26), IGNORE),
    **{0: 0, 2: 1, 3: 9, 4: 11, 5: 12, 6: 17, 7: 18, 9: 13, 10: 14, 11: 15, 14: 3, 15: 4},
    **{18: 7, 19: 6, 20: 5, 22: 2, 24: 8, 25: 10},
    IGNORE: IGNORE,
}
"""Level-3 id -> train id; what it merges is said in `IddSpec`."""


class IddSpec(PairedSpec, name="idd"):
    """IDD: unstructured traffic on Indian roads by day.

    encoding: of the masks that the kit has made. "csTrainId" and "id" hold the same; "level3Id",
        the kit's default, merges rail tracks with terrain, animals with persons, groups of poles
        with poles, fallback background with sky, and trains with other vehicles, which are ignored:
        its figures cannot be compared with those of the other two.
    Reads `leftImg8bit/` (PNG of part I, JPEG of part II) and `gtFine/`.
    """

    encoding: Encoding = "csTrainId"

    def pairs(self, root: Path, split: str) -> list[Pair]:
        decode = {"csTrainId": TRAIN_IDS, "id": LabelMap(IDS), "level3Id": LabelMap(LEVEL3)}
        return pair_files(
            self,
            root / "leftImg8bit" / split,
            ("_leftImg8bit.png", "_leftImg8bit.jpg"),
            [
                LabelFiles(
                    root / "gtFine" / split,
                    f"_gtFine_label{self.encoding}s.png",
                    decode[self.encoding],
                )
            ],
            LAYOUT,
        )

    def class_ids(self) -> Iterable[int]:
        return set(range(19)) - ({16} if self.encoding == "level3Id" else set())


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [IddSpec]
