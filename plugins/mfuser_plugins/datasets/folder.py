"""Any images with any masks: a folder of one's own, Pascal VOC, ADE20K, COCO panoptic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from mfuser import IGNORE, DataError, Dataset, DatasetSpec, hookimpl
from mfuser.errors import NoSplitError, suggest
from mfuser.specs import Proposal
from mfuser_plugins.datasets._files import (
    LabelMap,
    Pair,
    PairedDataset,
    chosen_split,
    require_folder,
    require_root,
    some,
    walk,
)
from mfuser_plugins.datasets._folder_maps import BinaryMap, ColorMap, panoptic_map

Encoding = Literal["ids", "off_by_one", "binary", "colors", "panoptic"]
Color = tuple[int, int, int]

IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
"""Names of the two splits in folders and lists."""
UNLABELED = ("ignore", "void", "unlabeled", "")
"""Names in a class table whose pixels are ignored."""


class FolderSpec(DatasetSpec, name="folder"):
    """Images and masks paired by the stem of their names. `mfuser data new FOLDER` writes this.

    images, masks: folders below the dataset's root, or globs ("frames/*.jpg"); "{split}" stands
        for the split's folder (train or training; val, valid or validation).
    image_suffix, mask_suffix: what follows the common stem, e.g. "_mask" for a.jpg, a_mask.png.
    classes: names in the order of their ids; or a table {id = name} or {"#rrggbb" = name}, where
        several ids may share a name and the names "ignore" and "void" are not scored; or a text
        file below the root with one name per line.
    encoding: ids (default); off_by_one (value i + 1 is class i, 0 ignored: ADE20K); binary (0 is
        the first class, everything else the second); colors (implied by a table of colors; palette
        images are read by their own palette); panoptic (COCO's id = R + 256 G + 65536 B).
    ignore: further values (or colors) that are not scored. None: 255, unless it is a class.
    lists: text files of stems, "splits/{split}.txt", in place of "{split}" folders.
    val_share, split_seed: in place of both, the share of all pairs that is held out, chosen by
        the names alone.
    annotations: of panoptic masks: the JSON file, "annotations/panoptic_{split}2017.json".
    """

    tiny: ClassVar[Mapping[str, Any]] = {"classes": ["background", "thing"]}

    images: str = "images"
    masks: str = "masks"
    image_suffix: str = ""
    mask_suffix: str = ""
    classes: tuple[str, ...] | dict[str, str] | str
    encoding: Encoding | None = None
    ignore: tuple[int | str, ...] | None = None
    lists: str | None = None
    val_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    split_seed: int = 0
    annotations: str | None = None

    @model_validator(mode="after")
    def _readable(self) -> FolderSpec:
        if not isinstance(self.classes, str):
            _meaning(self, self.classes)
        ways = [bool(self.lists), self.val_share > 0, "{split}" in self.images]
        if sum(ways) > 1:
            raise ValueError(
                "a split is given by 'lists', by 'val_share' or by '{split}' in 'images', not by "
                "two of them"
            )
        if (self.encoding == "panoptic") != (self.annotations is not None):
            raise ValueError("'annotations' goes with encoding = \"panoptic\", and only with it")
        return self

    def build(self, root: Path | None, split: str) -> Dataset:
        root = require_root(self, root)
        split = chosen_split(self, split)
        classes = self.classes
        if isinstance(classes, str):
            classes = _names_in(root / classes)
        try:
            names, decode = _meaning(self, classes)
        except ValueError as error:
            raise DataError(f"{self.component()}: {error}") from error
        if self.annotations is not None:
            decode = panoptic_map(root / _named(root, self.annotations, split), names)
        pairs = [Pair(key, image, mask, decode) for key, image, mask in _paired(self, root, split)]
        return FolderDataset(root, pairs, self.test_size, names)

    @classmethod
    def write_example(cls, root: Path) -> None:
        rng = np.random.default_rng(0)
        for name in ("images", "masks"):
            (root / name).mkdir()
        for k in range(4):
            image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
            image.save(root / "images" / f"{k}.png")
            mask = Image.fromarray(rng.integers(0, 2, (40, 60), dtype=np.uint8))
            mask.save(root / "masks" / f"{k}.png")

    @classmethod
    def propose(cls, folder: Path) -> Proposal | None:
        from mfuser_plugins.datasets._folder_look import propose

        return propose(folder)


class FolderDataset(PairedDataset):
    def __init__(
        self,
        root: Path,
        pairs: Sequence[Pair],
        test_size: tuple[int, int] | None,
        names: tuple[str, ...],
    ) -> None:
        super().__init__(root, pairs, test_size, range(len(names)))
        self.classes = names


def _meaning(
    spec: FolderSpec, classes: tuple[str, ...] | dict[str, str]
) -> tuple[tuple[str, ...], LabelMap]:
    """(names, value -> class). Raises ValueError for a table that cannot be meant."""
    table = dict(classes) if isinstance(classes, dict) else None
    listed = list(table.values()) if table is not None else list(classes)
    names = tuple(dict.fromkeys(n for n in listed if n.lower() not in UNLABELED))
    if not names:
        raise ValueError("'classes' names no class")
    if len(names) > IGNORE:
        raise ValueError(
            f"'classes' has {len(names)} names; a mask of 8 bits holds at most {IGNORE} beside "
            f"the ignored {IGNORE}"
        )
    if table is None and len(names) != len(listed):
        twice = next((n for n in listed if listed.count(n) > 1), "")
        raise ValueError(f"'classes' names '{twice}' twice; a table {{id = name}} may")
    index = {name: k for k, name in enumerate(names)}
    encoding = spec.encoding or "ids"
    keys = [_key(k) for k in table] if table is not None else []
    if any(isinstance(k, tuple) for k in keys):
        if encoding not in ("ids", "colors") or not all(isinstance(k, tuple) for k in keys):
            raise ValueError("'classes' mixes colors with ids; write one kind")
        encoding = "colors"
    elif encoding == "colors":
        raise ValueError('encoding = "colors" needs a table: classes = {"#rrggbb" = "name", …}')
    if table is not None and encoding not in ("ids", "colors"):
        raise ValueError(f'encoding = "{encoding}" takes a list of names, not a table')
    if encoding == "binary" and len(names) != 2:
        raise ValueError(f'encoding = "binary" takes two names, not {len(names)}')
    values: dict[Any, int] = {}
    start = 1 if encoding == "off_by_one" else 0
    for key, name in zip(keys or range(start, start + len(listed)), listed, strict=True):
        if key in values:
            raise ValueError(f"'classes' gives {_shown(key)} twice, for '{name}' and another")
        values[key] = index.get(name, IGNORE)
    ignored = [_key(k) for k in spec.ignore] if spec.ignore is not None else None
    for key in ignored or ():
        if key in values and values[key] != IGNORE:
            raise ValueError(
                f"{_shown(key)} is in 'ignore' and is class '{names[values[key]]}' as well"
            )
        if isinstance(key, tuple) != (encoding == "colors"):
            raise ValueError(f"'ignore' holds {_shown(key)}, and masks hold {encoding}")
        values[key] = IGNORE
    if encoding == "colors":
        return names, ColorMap({}, colors=values)
    if ignored is None:
        values.setdefault(IGNORE, IGNORE)
    if encoding == "off_by_one":
        values.setdefault(0, IGNORE)
    if encoding == "binary":
        return names, BinaryMap({0: 0, 1: 1})
    return names, LabelMap(values)


def _key(key: int | str) -> int | Color:
    """ "7", "#ff0000" or "255,0,0". Raises ValueError."""
    text = str(key).strip()
    if text.startswith("#") and len(text) == 7:
        try:
            return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
        except ValueError:
            pass
    parts = text.replace(" ", ",").split(",")
    numbers = [int(p) for p in parts if p.isdecimal()]
    if len(numbers) == len(parts) == 1 and numbers[0] < 65536:
        return numbers[0]
    if len(numbers) == len(parts) == 3 and max(numbers) < 256:
        return numbers[0], numbers[1], numbers[2]
    raise ValueError(f'\'{key}\' is neither an id (0 to 65535) nor a color ("#rrggbb" or "r,g,b")')


def _shown(key: int | Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*key) if isinstance(key, tuple) else f"the id {key}"


def _names_in(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"folder: the class names in {path} cannot be read: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _named(root: Path, pattern: str, split: str) -> str:
    """`pattern` with {split} as the files on disk call it."""
    for name in SPLITS[split]:
        candidate = pattern.replace("{split}", name)
        if (root / candidate.partition("*")[0]).exists():
            return candidate
    return pattern.replace("{split}", split)


def _files(spec: FolderSpec, root: Path, pattern: str, suffix: str, split: str) -> dict[str, Path]:
    """Key (path below the folder without suffix and ending) -> file."""
    pattern = _named(root, pattern, split)
    before, star, _ = pattern.partition("*")
    base = root / (before.rpartition("/")[0] if star else before)
    if not base.is_dir() and split == "val":
        raise NoSplitError(
            f"{spec.component()}: there is no val split: {base} does not exist; set val_share to "
            'hold out a share of the training images, or split = "train" to use them all'
        )
    require_folder(spec, base, f"images = {spec.images!r}, masks = {spec.masks!r}")
    if star:
        listed = [p.relative_to(base).as_posix() for p in sorted(root.glob(pattern))]
    else:
        listed = sorted(walk(base))
    found: dict[str, Path] = {}
    for name in listed:
        stem, dot, ending = name.rpartition(".")
        if dot and f".{ending.lower()}" in IMAGES and stem.endswith(suffix):
            key = stem[: len(stem) - len(suffix)] if suffix else stem
            if key in found:
                raise DataError(
                    f"{spec.component()}: {found[key]} and {base / name} have the same stem; "
                    f"keep one, or tell them apart with image_suffix and mask_suffix"
                )
            found[key] = base / name
    return found


def _paired(spec: FolderSpec, root: Path, split: str) -> list[tuple[str, Path, Path]]:
    """(key, image, mask) of the split, sorted. Raises DataError for what does not pair."""
    masks = _files(spec, root, spec.masks, spec.mask_suffix, split)
    images = _files(spec, root, spec.images, spec.image_suffix, split)
    taken = set(masks.values()) if spec.mask_suffix else set()  # one folder may hold both
    images = {key: path for key, path in images.items() if path not in taken}
    by_stem: dict[str, list[Path]] = {}
    for key, path in masks.items():
        by_stem.setdefault(key.rpartition("/")[2], []).append(path)
    listed = _listed(spec, root, split)
    pairs, without = [], []
    for key, image in sorted(images.items()):
        stem = key.rpartition("/")[2]
        if listed is not None and key not in listed:
            continue
        mask = masks.get(key)
        if mask is None and len(by_stem.get(stem, ())) == 1:
            mask = by_stem[stem][0]
        if mask is None:
            without.append(image)
        else:
            pairs.append((key, image, mask))
    where = f"{root / spec.images} and {root / spec.masks}"
    if without:
        raise DataError(
            f"{spec.component()}: {len(without)} of {len(without) + len(pairs)} images have no "
            f"mask of the same stem: {some(p.name for p in without)} ({where}); masks are there "
            f"for {some(masks)}: set mask_suffix, or move the images away"
        )
    if listed is not None:
        found = _Names(key for key, _, _ in pairs)
        missing = sorted(name for name in listed.names if name not in found)
        if missing:
            raise DataError(
                f"{spec.component()}: the {split} list names {len(missing)} images that are not "
                f"there: {some(missing)}{suggest(missing[0], found.names)}"
            )
    if not pairs:
        raise DataError(f"{spec.component()}: no image with a mask in {where}")
    return _held_out(spec, pairs, split)


class _Names:
    """Names with "in" for names that agree from the end on: "b/c" with "c" and with "a/b/c"."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.ends = {end for name in self.names for end in _ends(name)}

    def __contains__(self, name: str) -> bool:
        return name in self.ends or any(end in self.names for end in _ends(name))


def _ends(name: str) -> list[str]:
    """ "a/b/c" -> "a/b/c", "b/c", "c"."""
    parts = name.split("/")
    return ["/".join(parts[k:]) for k in range(len(parts))]


def _held_out(
    spec: FolderSpec, pairs: list[tuple[str, Path, Path]], split: str
) -> list[tuple[str, Path, Path]]:
    told = spec.lists or "{split}" in spec.images
    if spec.val_share == 0:
        if split == "val" and not told:
            raise NoSplitError(
                f"{spec.component()}: there is no val split; set val_share to hold out a share "
                'of the images, or split = "train" to use them all'
            )
        return pairs
    if len(pairs) < 2:
        raise DataError(f"{spec.component()}: one image cannot be divided into train and val")
    order = sorted(pairs, key=lambda p: _drawn(f"{spec.split_seed}:{p[0]}"))
    count = min(max(1, round(spec.val_share * len(pairs))), len(pairs) - 1)
    return sorted(order[:count] if split == "val" else order[count:])


def _drawn(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()  # names need not be UTF-8


def _listed(spec: FolderSpec, root: Path, split: str) -> _Names | None:
    """The stems that a list file names; a line may hold paths of image and mask."""
    if spec.lists is None:
        return None
    path = root / _named(root, spec.lists, split)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{spec.component()}: the list {path} cannot be read: {error}") from error
    words = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    return _Names(
        name.rpartition(".")[0] if name.lower().endswith(IMAGES) else name
        for name in (word.lstrip("/") for word in words)
    )


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [FolderSpec]
