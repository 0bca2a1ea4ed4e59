"""BRAVO (Vu et al., ECCV 2024 workshops): Cityscapes' validation images in rain and in flares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, get_args

from mfuser import DatasetSpec, hookimpl
from mfuser.errors import NoSplitError
from mfuser_plugins.datasets._conditions import ByCondition
from mfuser_plugins.datasets._files import Pair, city_labels, pair_files

Condition = Literal["synrain", "synflare"]

LAYOUT = (
    "bravo_synrain/<city>/*_leftImg8bit.png as unpacked, and beside it Cityscapes' "
    "gtFine/val/<city>/*_gtFine_labelIds.png"
)


class BravoSpec(ByCondition, name="bravo"):
    """BRAVO's two subsets whose truth is published: Cityscapes' validation images with drawn drops
    on the lens (500) and with drawn flares (308). A target only; one domain per subset.

    condition: synrain or synflare; none means both.
    Reads `bravo_synrain/` and `bravo_synflare/` as unpacked, and Cityscapes' own labels, whose
    folder `gtFine/` is copied or linked beside them. Every labeled pixel counts: which of them a
    flare hides is known to the challenge's server alone. Of the other subsets no truth is
    published; `mfuser predict --scores bravo` writes what the server takes for all of them.
    """

    CONDITIONS: ClassVar[tuple[str, ...]] = get_args(Condition)
    official: ClassVar[Mapping[str, int]] = {"val": 808}

    condition: Condition | None = None

    def pairs(self, root: Path, split: str) -> list[Pair]:
        if split == "train":
            raise NoSplitError(
                "bravo: the split 'train' does not exist: the dataset is there to test "
                "on; train on cityscapes"
            )
        labels = city_labels(root / "gtFine" / split, "_gtFine")
        pairs: list[Pair] = []
        for condition in self.chosen():
            images = root / f"bravo_{condition}"
            pairs += pair_files(self, images, ("_leftImg8bit.png",), labels, LAYOUT)
        return pairs

    def label(self) -> str:
        return f"bravo:{self.condition}" if self.condition else "bravo"


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [BravoSpec]
