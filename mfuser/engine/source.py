"""The sources of a run: their class counts, their samplers, the size of their images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec
from mfuser.data.images import UnreadableImage
from mfuser.data.loading import TRIES, ClassMap, Crop, CropSource, TrainingStream
from mfuser.data.parts import thinned
from mfuser.data.sampling import (
    ClassStatistics,
    RareClassSampler,
    ShuffledSampler,
    class_statistics,
)
from mfuser.engine.console import Console
from mfuser.errors import DataError, MFuserError, listed, unknown
from mfuser.files import CACHE, cache_folder, unwritable
from mfuser.interfaces import IGNORE, Dataset

COUNTED = 200
"""Source labels read for the most frequent class where nothing needs them all."""


@dataclass(frozen=True)
class Built:
    """A source as it is on disk. name: in reports. class_map: into the pairing's classes."""

    name: str
    dataset: Dataset
    class_map: ClassMap


def build_sources(registry: Registry, run: RunSpec) -> list[Built]:
    """Raises DataError for a source that is not there, has no class of the pairing, or whose first
    image is smaller than the crop."""
    built = []
    for source in run.sources:
        dataset, classes = source.build(registry, "train"), run.pairing.classes
        try:
            class_map = ClassMap(dataset, classes)
        except DataError as error:
            theirs = [dataset.classes[i] for i in dataset.class_ids]
            raise DataError(
                f"source '{source.name}' labels none of the pairing's classes ({listed(classes)}); "
                f"its own are {listed(theirs)}"
            ) from error
        check_crop(dataset, run.pairing.image_size)
        built.append(Built(source.name, dataset, class_map))
    return built


def count_classes(
    sources: Sequence[Built], run: RunSpec, console: Console
) -> list[ClassStatistics]:
    """Class counts of each source, in the pairing's classes: all of it for rare-class sampling,
    else a sample. Several sources are told apart by what they label.

    Raises DataError for a source no label of which shows a class of the pairing.
    """
    for one in sources:
        _tell_misspelt(one, run, console)
    if len(sources) > 1:
        for sentence in _unlabeled(sources, run.pairing.classes):
            console.say(sentence)
    return [one.class_map.statistics(_count(one, run, console)) for one in sources]


def _unlabeled(sources: Sequence[Built], classes: Sequence[str]) -> list[str]:
    """A sentence on each source that lacks classes of the pairing, and on what all of them lack."""
    lacking = {
        one.name: [name for k, name in enumerate(classes) if k not in one.class_map.shared]
        for one in sources
    }
    said = [
        f"source '{name}' never labels {', '.join(missing)}"
        for name, missing in lacking.items()
        if missing
    ]
    none = [name for name in classes if all(name in missing for missing in lacking.values())]
    return [*said, f"no source labels {', '.join(none)}"] if none else said


def _count(built: Built, run: RunSpec, console: Console) -> ClassStatistics:
    source, class_map = built.dataset, built.class_map
    skip = run.recipe.on_bad_image == "skip"
    if run.recipe.rare_classes is None:
        sampled = class_statistics(thinned(source, COUNTED), skip_unreadable=skip)
        if class_map.statistics(sampled).pixels.any():
            return sampled
    of = f" of {built.name}" if len(run.sources) > 1 else ""
    with console.task(f"counting classes{of}", len(source)) as task:
        counted = class_statistics(
            source,
            _cache(console),
            lambda done, total: task.advance(done - task.done),
            workers=min(8, os.cpu_count() or 1),
            skip_unreadable=skip,
        )
    if not class_map.statistics(counted).pixels.any():
        raise DataError(
            f"dataset '{built.name}': none of its {len(source)} labels shows a class of the "
            "pairing, every pixel is ignored; check its labels and how they are mapped "
            "(mfuser data check)"
        )
    return counted


def _tell_misspelt(built: Built, run: RunSpec, console: Console) -> None:
    """Classes that a source does not label, though it labels one of nearly the same name."""
    theirs, ours = built.dataset.classes, run.pairing.classes
    spare = [c for c in theirs if c not in ours]
    near = [c for c in ours if c not in theirs and get_close_matches(c, spare, n=1)]
    if near:
        console.say(
            f"source '{built.name}' labels no {unknown(near, spare)}, so nothing of it teaches the "
            "pairing that class"
        )


def _cache(console: Console) -> Path | None:
    """The folder of cached class counts; None, with a warning, if nothing can be written."""
    folder = cache_folder()
    reason = "this user has no home folder" if folder is None else unwritable(folder)
    if reason is None:
        return folder
    console.say(
        f"class counts are not kept for the next run: {reason}; set {CACHE} to a folder that can "
        "be written"
    )
    return None


def crop_sources(
    sources: Sequence[Built], run: RunSpec, statistics: Sequence[ClassStatistics]
) -> list[CropSource]:
    """The sources with a sampler of their own: rare classes are those that are rare in it."""
    rare = run.recipe.rare_classes
    return [
        CropSource(
            one.dataset,
            one.class_map,
            ShuffledSampler(len(one.dataset), stream)
            if rare is None
            else RareClassSampler(counted, rare.temperature, rare.min_pixels),
        )
        for stream, (one, counted) in enumerate(zip(sources, statistics, strict=True))
    ]


def described(
    run: RunSpec, sources: Sequence[Built], statistics: Sequence[ClassStatistics]
) -> RunSpec:
    """The run with what its sources show: the classes that they label, and the one that covers
    most of the crops."""
    classes = run.pairing.classes
    shares = [
        source.share * counted.frequencies
        for source, counted in zip(run.sources, statistics, strict=True)
    ]
    labeled = sorted({k for one in sources for k in one.class_map.shared})
    return run.model_copy(
        update={
            "most_frequent": classes[int(np.sum(shares, axis=0).argmax())],
            "source_classes": tuple(classes[k] for k in labeled),
        }
    )


def check_crop(source: Dataset, crop: tuple[int, int]) -> None:
    """The first image tells early what every image would."""
    try:
        height, width = source[0].image.shape[:2]
    except UnreadableImage:
        return  # fatal or skipped, as the recipe says, where it is read
    if height < crop[0] or width < crop[1]:
        raise DataError(
            f"{source.name(0)} is {height}x{width}, smaller than the crop of {crop[0]}x{crop[1]} "
            "(height x width): set a smaller image_size, e.g. --set image_size="
            f"{min(height, width)}"
        )


def check_crops(stream: TrainingStream, start: int, run: RunSpec) -> None:
    """Raises DataError where a source's first crops of a run show ignored pixels alone."""
    if start:
        return
    height, width = run.pairing.image_size
    for k, source in enumerate(run.sources):
        if not any(map(_usable, map(stream.crops.__getitem__, stream.first(k, TRIES)))):
            raise DataError(
                f"dataset '{source.name}': its first {TRIES} crops of {height}x{width} (height x "
                "width) show no class of the pairing, every pixel is ignored; check its labels "
                "and how they are mapped (mfuser data check), or take larger crops (--set "
                "image_size=…)"
            )


def _usable(crop: Crop | MFuserError) -> bool:
    """An image that cannot be used at all is reported when its turn comes."""
    return isinstance(crop, MFuserError) or bool((crop[1] != IGNORE).any())
