"""A dataset on disk, looked at before it costs a day: counts, sizes, classes, what is odd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from os import cpu_count
from typing import Any

import numpy as np

from mfuser.errors import DataError
from mfuser.interfaces import IGNORE, Dataset

SAMPLE = 24
"""Files that are opened without --full."""
BLURRED = 24
"""More distinct values than classes by so many: interpolated edges, not ids."""
MOSTLY_IGNORED = 0.5


@dataclass
class DatasetCheck:
    """Findings for one split of a dataset.

    images: how many there are; official: how many its publisher ships, where known. opened: files
    that were read. sizes: "WxH" -> images. classes: name -> share of the labeled pixels, those
    seen. ignored: share of all pixels. values: stored value -> share of all pixels, the 32 most
    frequent. problems: what keeps images from being used. warnings: what looks wrong.
    """

    dataset: str
    split: str
    images: int = 0
    official: int | None = None
    opened: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    classes: dict[str, float] = field(default_factory=dict)
    ignored: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Look:
    """One image and its label."""

    name: str
    size: tuple[int, int] | None = None
    classes: np.ndarray | None = None
    values: tuple[tuple[int, int], ...] = ()
    problem: str = ""


def to_open(dataset: Dataset, full: bool) -> int:
    """The number of images that `check_dataset` opens."""
    return len(dataset) if full else min(len(dataset), SAMPLE)


def check_dataset(
    name: str,
    split: str,
    dataset: Dataset,
    *,
    official: int | None = None,
    full: bool = False,
    opened: Callable[[], None] | None = None,
) -> DatasetCheck:
    """Open a sample of the images and labels, or all of them, and say what is odd.

    official: how many images the publisher ships. opened: called after each image.
    """
    count = len(dataset)
    indices = np.linspace(0, count - 1, to_open(dataset, full)).astype(int)
    looks: list[_Look] = []
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        for look in pool.map(lambda i: _look(dataset, int(i)), indices):
            looks.append(look)
            if opened is not None:
                opened()
    found = DatasetCheck(name, split, count, official, len(looks))
    _count(found, dataset, looks)
    _judge(found, dataset, looks)
    return found


def _look(dataset: Dataset, index: int) -> _Look:
    try:
        name = dataset.name(index)
    except DataError as error:
        return _Look(str(index), problem=str(error))
    values: tuple[tuple[int, int], ...] = ()
    try:
        raw = dataset.raw(index)
        if raw is not None and raw.ndim == 2 and raw.dtype.kind in "ui":
            found, counts = np.unique(raw, return_counts=True)
            values = tuple(zip(found.tolist(), counts.tolist(), strict=True))
        sample = dataset[index]
    except DataError as error:
        return _Look(name, values=values, problem=str(error))
    height, width = sample.label.shape
    classes = np.bincount(sample.label.ravel().astype(np.int64), minlength=IGNORE + 1)
    return _Look(name, (width, height), classes, values)


def _count(found: DatasetCheck, dataset: Dataset, looks: list[_Look]) -> None:
    sizes = Counter(look.size for look in looks if look.size is not None)
    found.sizes = {f"{w}x{h}": n for (w, h), n in sizes.most_common()}
    pixels = sum((k.classes for k in looks if k.classes is not None), np.zeros(IGNORE + 1, int))
    labeled = int(pixels[:IGNORE].sum())
    total = labeled + int(pixels[IGNORE])
    found.ignored = float(pixels[IGNORE] / total) if total else 0.0
    found.classes = {
        name: float(pixels[k] / labeled) for k, name in enumerate(dataset.classes) if pixels[k]
    }
    values: Counter[int] = Counter()
    for look in looks:
        values.update(dict(look.values))
    everything = sum(values.values())
    found.values = {str(v): n / everything for v, n in values.most_common(32)}


def _judge(found: DatasetCheck, dataset: Dataset, looks: list[_Look]) -> None:
    broken = [look for look in looks if look.problem]
    most = len(broken) if found.opened == found.images else 3  # of a sample, some stand for all
    for look in broken[:most]:
        found.problems.append(look.problem)
    if len(broken) > most:
        found.problems.append(f"{len(broken)} of {found.opened} opened cannot be used")
    blurred = [
        look.name
        for look in broken
        if len(look.values) > len(dataset.classes) + BLURRED and _is_thin(look)
    ]
    if blurred:
        found.problems.append(
            f"{_some(blurred)}: {len(blurred)} labels hold values between those of the classes, "
            "as resizing with interpolation leaves them at edges; make them again with nearest "
            "neighbor"
        )
    whole = [look for look in looks if look.classes is not None]
    empty = [k.name for k in whole if k.classes is not None and not k.classes[:IGNORE].any()]
    if empty:
        found.warnings.append(
            f"{len(empty)} of {found.opened} labels are ignored everywhere: {_some(empty)}; "
            "nothing can be learned from them: check the ids, or move the pairs away"
        )
    flat = [
        k.name for k in whole if k.classes is not None and np.count_nonzero(k.classes[:IGNORE]) == 1
    ]
    if len(dataset.classes) > 1 and len(flat) > len(whole) // 2 and flat:
        found.warnings.append(
            f"{len(flat)} of {found.opened} labels show one class alone: {_some(flat)}; a wrong "
            "class table, or masks that were saved with their values scaled"
        )
    values = {int(v) for v in found.values}
    last = len(dataset.classes) - 1
    if found.ignored > MOSTLY_IGNORED and values and max(values - {IGNORE}, default=IGNORE) <= last:
        found.warnings.append(
            f"{found.ignored:.0%} of the pixels are ignored, and the labels hold 0 to "
            f"{max(values - {IGNORE})} alone: these look like train ids under a name that "
            "promises the dataset's ids; name them as its converter does (…_labelTrainIds.png), "
            "or restore the originals"
        )
    if found.official is not None and found.images != found.official:
        found.warnings.append(
            f"{found.images} images, {found.official} in the official {found.split} split; "
            f"{'some are missing' if found.images < found.official else 'there are more'}"
        )
    absent = [
        dataset.classes[i] for i in dataset.class_ids if dataset.classes[i] not in found.classes
    ]
    if absent and found.opened == found.images and whole:
        found.warnings.append(f"no pixel of {_some(absent, 5)}")


def _is_thin(look: _Look) -> bool:
    """Whether most values cover few pixels: edges."""
    total = sum(n for _, n in look.values)
    return sum(n < total / 500 for _, n in look.values) > len(look.values) // 2


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
