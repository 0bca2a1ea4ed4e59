"""CamVid in the 11-class form of SegNet (Brostow et al. 2008; Badrinarayanan et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from mfuser import IGNORE, DataError, DatasetSpec, hookimpl
from mfuser.errors import suggest
from mfuser_plugins.datasets._files import (
    LabelFiles,
    LabelMap,
    Pair,
    PairedSpec,
    pair_files,
    require_folder,
)

LAYOUT = (
    "images/, labels/ and list.txt with lines 'FILE SEQUENCE SPLIT', or train/, trainannot/, "
    "val/, valannot/, test/, testannot/"
)

IDS = {0: 10, 1: 2, 2: 5, 3: 0, 4: 1, 5: 8, 6: 7, 7: 4, 8: 13, 9: 11, 10: 18, 11: IGNORE}
"""Id -> train id. Lossy: signs hold traffic lights, cars all vehicles, bicyclists rider and
bicycle; only these 11 classes can be scored."""


def _split_names(value: Any) -> Any:
    return [name for name in value.split("+") if name] if isinstance(value, str) else value


class CamvidSpec(PairedSpec, name="camvid"):
    """CamVid, 11 classes: 701 frames of Cambridge streets from a car, by day and at dusk.

    sequences: only these, e.g. ["0016E5", "0006R0"] or "0016E5+0006R0"; none means all. 0016E5
        and 0006R0 are by day, Seq05VD is another day in other streets, 0001TP at dusk.
    split: "val" holds every frame that is not for training (CamVid's val and test).
    all_frames: whatever the split; for studies that divide by sequence.
    Scored over the 11 classes that it shares with Cityscapes.
    """

    variant: ClassVar[str | None] = "sequences"

    sequences: Annotated[list[str], Field(min_length=1), BeforeValidator(_split_names)] | None = (
        None
    )

    all_frames: bool = False

    def pairs(self, root: Path, split: str) -> list[Pair]:
        train = split == "train"
        frames = self._listed(root) if (root / "list.txt").is_file() else self._folders(root)
        present = {sequence for sequence, _, _ in frames}
        for name in self.sequences or ():
            if name not in present:
                raise DataError(f"camvid: no sequence '{name}' in {root}{suggest(name, present)}")
        pairs = [
            pair
            for sequence, part, pair in frames
            if (self.all_frames or (part == "train") == train)
            and sequence in (self.sequences or present)
        ]
        if not pairs:
            parts = sorted({p for s, p, _ in frames if s in (self.sequences or present)})
            raise DataError(
                f"{self.label()}: none of its frames is {'of' if train else 'outside'} the train "
                f"split; {root} has them as {', '.join(parts)}. Choose other sequences, or the "
                "other split"
            )
        return pairs

    def class_ids(self) -> Iterable[int]:
        return set(IDS.values()) - {IGNORE}

    def label(self) -> str:
        return "camvid" if self.sequences is None else f"camvid:{'+'.join(self.sequences)}"

    def _listed(self, root: Path) -> list[tuple[str, str, Pair]]:
        """(sequence, split, pair) of every line of list.txt."""
        path = root / "list.txt"
        entries: dict[str, tuple[str, str]] = {}
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 3 or words[2] not in ("train", "val", "test"):
                raise DataError(
                    f"{path}, line {number}: expected 'FILE SEQUENCE SPLIT' with a split of train, "
                    f"val or test, not '{line.strip()[:80]}'"
                )
            entries[Path(words[0]).stem] = (words[1], words[2])
        pairs = {
            pair.key: pair
            for pair in _pairs(self, root / "images", root / "labels")
            if pair.key in entries
        }
        missing = [key for key in entries if key not in pairs]
        if missing:
            raise DataError(
                f"{path} names {len(missing)} images that {root / 'images'} does not hold: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
            )
        return [(*entries[key], pair) for key, pair in pairs.items()]

    def _folders(self, root: Path) -> list[tuple[str, str, Pair]]:
        """(sequence, split, pair) of SegNet's folders; a file's name starts with its sequence."""
        found = [s for s in ("train", "val", "test") if (root / s).is_dir()]
        if not found:
            require_folder(self, root / "train", LAYOUT)
        return [
            (pair.image.name.split("_")[0], part, pair)
            for part in found
            for pair in _pairs(self, root / part, root / f"{part}annot")
        ]


def _pairs(spec: CamvidSpec, images: Path, labels: Path) -> list[Pair]:
    return pair_files(spec, images, (".png",), [LabelFiles(labels, ".png", LabelMap(IDS))], LAYOUT)


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [CamvidSpec]
