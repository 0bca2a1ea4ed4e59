"""Shared by the readers of official datasets: pairing files, label maps, precise errors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np

from mfuser import IGNORE, DataError, Dataset, DatasetSpec, Sample
from mfuser.config.classes import CITYSCAPES
from mfuser.data.images import read_image, read_label
from mfuser.data.lookup import ByteTable
from mfuser.errors import NoSplitError, legible

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

CONVERTED = "_labelTrainIds.png"
"""Suffix of converted labels that converters write beside the official ones."""

CITYSCAPES_IDS = {
    **dict.fromkeys(range(35), IGNORE),
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11},
    **{25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
    IGNORE: IGNORE,
}
"""Cityscapes id -> train id (cityscapesScripts, labels.py). 34 is GTA's license plate, 255 the
license plate's -1 in 8 bits."""


class LabelMap:
    """From a label file's raw values to train ids, through a lookup table.

    ids: value -> train id; every other value is an error.
    channel: the channel of a 16-bit color PNG that holds the value.
    colors: RGB -> train id, for files that hold colors instead of an index.
    hint: a sentence for the error about a value that is not in the map.
    """

    def __init__(
        self,
        ids: Mapping[int, int],
        *,
        channel: int | None = None,
        colors: Mapping[tuple[int, int, int], int] | None = None,
        hint: str = "",
    ) -> None:
        self.table = np.full(max(256, max(ids, default=0) + 1), -1, np.int64)
        for value, train_id in ids.items():
            self.table[value] = train_id
        self._bytes = ByteTable(self.table[:256])
        self.channel = channel
        self.hint = hint
        self._codes, self._targets = np.empty(0, np.int32), np.empty(0, np.int64)
        if colors:
            codes = {(r << 16) | (g << 8) | b: train_id for (r, g, b), train_id in colors.items()}
            self._codes = np.array(sorted(codes), np.int32)
            self._targets = np.array([codes[int(code)] for code in self._codes], np.int64)

    def key(self) -> bytes:
        """Equal for maps that give equal labels."""
        parts = (self.table, self._codes, self._targets)
        return b"".join(part.tobytes() for part in parts) + repr(self.channel).encode()

    def __call__(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """Raw values of the file `path` -> int64 (H, W). Raises DataError for strange values."""
        return self.mapped(raw, path).astype(np.int64, copy=False)

    def mapped(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """The same as uint8 or int64, whichever costs less."""
        if raw.ndim == 3 and self.channel is not None:
            if raw.dtype != np.uint16:
                raise DataError(
                    f"{path} has {8 * raw.dtype.itemsize} bits per channel, the official labels "
                    "have 16: a tool that keeps only the high byte has saved it again, and the "
                    "classes are lost; restore it from the dataset"
                )
            raw = raw[..., self.channel]
        if raw.ndim == 3 and len(self._codes) and raw.shape[2] >= 3 and raw.dtype == np.uint8:
            return self._by_color(raw, path)
        if raw.ndim != 2 or raw.dtype.kind not in "ui":
            raise DataError(
                f"{path} is a color picture, not a label: the official labels hold one id (or "
                "palette index) per pixel; restore it from the dataset"
            )
        if raw.dtype == np.uint8 and (short := self._bytes(raw)) is not None:
            return short
        most = len(self.table) - 1
        small = raw if raw.dtype == np.uint8 else np.clip(raw, 0, most).astype(np.uint16)
        label = self.table[small]
        outside = label < 0 if small is raw else (label < 0) | (small != raw)
        if outside.any():
            values = np.unique(raw[outside])
            allowed = _ranges(int(v) for v in np.flatnonzero(self.table >= 0))
            raise DataError(
                f"{path} holds the label value {some(values)} ({int(outside.sum())} pixels); "
                f"the map knows {allowed}{self.hint}"
            )
        return label

    def _by_color(self, raw: np.ndarray, path: Path) -> np.ndarray:
        wide = raw.astype(np.int32)
        codes = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        outside = self._codes[places] != codes
        if outside.any():
            colors = np.unique(raw[outside][:, :3], axis=0)
            raise DataError(
                f"{path} holds the color {some(colors.tolist())} ({int(outside.sum())} "
                f"pixels), which is none of the {len(self._codes)} label colors"
            )
        return self._targets[places]


TRAIN_IDS = LabelMap({**{i: i for i in range(19)}, IGNORE: IGNORE})
"""The map of labels that already hold train ids."""


@dataclass(frozen=True)
class LabelFiles:
    """Where labels may lie: `folder`/KEY + `suffix`, for an image whose key is KEY.

    prefix: what the file name in KEY begins with, and what the label's begins with instead.
    """

    folder: Path
    suffix: str
    decode: LabelMap
    prefix: tuple[str, str] = ("", "")

    def name(self, key: str) -> str:
        """The label's path below `folder`."""
        above, slash, name = key.rpartition("/")
        return above + slash + self.prefix[1] + name.removeprefix(self.prefix[0]) + self.suffix


def city_labels(folder: Path, stem: str) -> list[LabelFiles]:
    """Labels in Cityscapes' ids below `folder`; train ids come first where an image has both."""
    return [
        LabelFiles(folder, f"{stem}_labelTrainIds.png", TRAIN_IDS),
        LabelFiles(folder, f"{stem}_labelIds.png", LabelMap(CITYSCAPES_IDS)),
    ]


@dataclass(frozen=True)
class Pair:
    """An image file and its label file; key: the image's path below its folder, no suffix."""

    key: str
    image: Path
    label: Path
    decode: LabelMap


class PairedDataset(Dataset):
    """Pairs of image and label files, decoded to the 19 train ids when they are read."""

    classes = CITYSCAPES.names

    def __init__(
        self,
        root: Path,
        pairs: Sequence[Pair],
        test_size: tuple[int, int] | None,
        class_ids: Iterable[int] = range(19),
    ) -> None:
        self.root = root
        self.pairs = list(pairs)
        self.test_size = test_size
        self.class_ids = tuple(sorted(class_ids))
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        image, label = read_image(pair.image), self.label(index)
        if image.shape[:2] != label.shape and image.shape[1::-1] == label.shape:
            image = read_image(pair.image, upright=True)  # drawn in a viewer that turned it
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{pair.label} is {label.shape[1]}x{label.shape[0]}, its image {pair.image} is "
                f"{image.shape[1]}x{image.shape[0]} (width x height): they must be equal; restore "
                "both from the dataset, or move the pair away"
            )
        return Sample(image, label.astype(np.int64, copy=False), self.name(index))

    def name(self, index: int) -> str:
        return legible(self.pairs[index].key.rpartition("/")[2])

    def label(self, index: int) -> np.ndarray:
        pair = self.pairs[index]
        return pair.decode.mapped(read_label(pair.label), pair.label)

    def image_file(self, index: int) -> Path | None:
        own = type(self).__getitem__ is PairedDataset.__getitem__
        return self.pairs[index].image if own else None

    def raw(self, index: int) -> np.ndarray:
        return read_label(self.pairs[index].label)

    def fingerprint(self) -> str:
        """A hash of names, sizes and modification times of all files, and of the label maps."""
        if self._fingerprint is None:
            digest = sha256()
            for pair in sorted(self.pairs, key=lambda pair: str(pair.image)):
                for path in (pair.image, pair.label):
                    state = path.stat()
                    name = os.path.relpath(path, self.root)
                    entry = f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n"
                    digest.update(entry.encode("utf-8", "surrogateescape"))
            for key in sorted({pair.decode.key() for pair in self.pairs}):
                digest.update(key)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class PairedSpec(DatasetSpec):
    """Image files with label files; each dataset says which belong together."""

    nested: ClassVar[tuple[str, str] | None] = None
    """(A, B): where B is below the root and A is not, the dataset lies in B."""

    def pairs(self, root: Path, split: str) -> list[Pair]:
        """The pairs of the split "train" or "val" in the existing folder `root`."""
        raise NotImplementedError

    def class_ids(self) -> Iterable[int]:
        """Train ids that the labels distinguish; the others are not scored."""
        return range(19)

    def build(self, root: Path | None, split: str) -> Dataset:
        root = require_root(self, root)
        if self.nested is not None:
            inside, above = self.nested
            if not (root / inside).is_dir() and (root / above).is_dir():
                root /= above
        pairs = self.pairs(root, chosen_split(self, split))
        return PairedDataset(root, pairs, self.test_size, self.class_ids())


def require_root(spec: DatasetSpec, root: Path | None) -> Path:
    """The dataset's folder, which exists. Raises DataError saying how to give one."""
    name = spec.component()
    if root is None:
        raise DataError(
            f"{name}: it is not known where this dataset lies. Give its folder with --data-root "
            f"{name}=PATH, or let MFUSER_DATA name a folder that holds {name}/, or write "
            f'{name} = "PATH" under [data] in a registry file'
        )
    return require_folder(spec, Path(root))


def require_folder(spec: DatasetSpec, path: Path, layout: str = "") -> Path:
    """`path`, which is a folder. Raises DataError saying what lies there instead.

    layout: what the dataset is expected to look like below its root.
    """
    if path.is_dir():
        return path
    kind = "is a file, not a folder" if path.exists() else "does not exist"
    text = f"{spec.component()}: the folder {path} {kind}"
    if layout:
        text += f" (expected: {layout})"
    above = path.parent
    while not above.is_dir() and above != above.parent:
        above = above.parent
    if layout and above.is_dir():
        names = sorted(p.name for p in above.iterdir() if not p.name.startswith("."))
        text += f"; {above} holds {some(names, 8) if names else 'nothing'}"
    raise DataError(text)


def chosen_split(spec: DatasetSpec, split: str) -> str:
    """ "train" or "val": the spec's own, or what the caller wants."""
    chosen = spec.split or split
    if chosen not in ("train", "val"):
        raise DataError(f"{spec.component()}: there is no split '{chosen}'; it is train or val")
    return chosen


def unsplit_folder(spec: DatasetSpec, images: Path, split: str) -> tuple[Path, str]:
    """Images of a dataset that ships without splits: all of them train.

    Folders `train` and `val` that a user has made below are honored. Returns the image folder
    and the name of the split's folder ("" without).
    """
    if not images.is_dir():
        return images, ""  # pairing says so
    names = ("val", "valid") if split == "val" else ("train",)
    for name in names:
        if (images / name).is_dir():
            return images / name, name
    if split == "val":
        raise NoSplitError(
            f"{spec.component()}: the dataset ships without a val split and {images / 'val'} does "
            'not exist; set split = "train" to use all its images, or move some to that folder'
        )
    return images, ""


def pair_files(
    spec: DatasetSpec,
    images: Path,
    suffixes: Sequence[str],
    labels: Sequence[LabelFiles],
    layout: str,
) -> list[Pair]:
    """Every image below `images` that ends in one of `suffixes`, with its label, sorted.

    labels: by preference; the first that has a file for the image's key serves. Labels without
    an image are ignored. Raises DataError for missing or empty folders and missing labels.
    """
    name = spec.component()
    require_folder(spec, images, layout)
    folders = {files.folder for files in labels if files.folder.is_dir()}
    if not folders:
        tried = ", ".join(str(folder) for folder in dict.fromkeys(f.folder for f in labels))
        raise DataError(
            f"{name}: there is no folder of labels; looked for {tried} (expected: {layout})"
        )
    found = {}
    for path in walk(images):
        ending = next((s for s in suffixes if path.lower().endswith(s.lower())), None)
        if ending is not None and not path.endswith(CONVERTED):
            found[path[: -len(ending)]] = images / path
    if not found:
        raise DataError(
            f"{name}: there is no image ({', '.join('*' + s for s in suffixes)}) below {images} "
            f"(expected: {layout})"
        )
    present = {folder: set(walk(folder)) for folder in folders}
    usable = [files for files in labels if files.folder in folders]
    pairs, without = [], []
    for key, image in sorted(found.items()):
        for files in usable:
            if files.name(key) in present[files.folder]:
                label = files.folder / files.name(key)
                pairs.append(Pair(key, image, label, files.decode))
                break
        else:
            without.append(key)
    if without:
        shown = ", ".join(found[key].name for key in without[:3])
        raise DataError(
            f"{name}: {len(without)} of {len(found)} images below {images} have no label: {shown}"
            f"{', …' if len(without) > 3 else ''}; expected for the first: "
            f"{usable[0].folder / usable[0].name(without[0])}"
        )
    return pairs


def walk(folder: Path) -> list[str]:
    """Paths of all files below, with forward slashes; hidden ones (._x of macOS) left out."""
    result = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        prefix = Path(base).relative_to(folder).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        result += [prefix + f for f in files if not f.startswith(".")]
    return result


def some(values: Iterable[object], most: int = 3) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")


def _ranges(values: Iterable[int]) -> str:
    """[0, 1, 2, 255] -> "0 to 2, 255"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
