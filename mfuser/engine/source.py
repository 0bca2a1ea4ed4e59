"""The source of a run: its class counts, its sampler, the size of its images."""

from __future__ import annotations

import os
from pathlib import Path

from mfuser.config.recipe import RecipeSpec
from mfuser.config.run import RunSpec
from mfuser.data.images import UnreadableImage
from mfuser.data.loading import TRIES, ClassMap, TrainingStream
from mfuser.data.parts import thinned
from mfuser.data.sampling import (
    ClassStatistics,
    RareClassSampler,
    ShuffledSampler,
    class_statistics,
)
from mfuser.engine.console import Console
from mfuser.errors import DataError, MFuserError
from mfuser.files import CACHE, cache_folder, unwritable
from mfuser.interfaces import IGNORE, Dataset

COUNTED = 200
"""Source labels read for the most frequent class where nothing needs them all."""


def count_classes(
    source: Dataset, class_map: ClassMap, run: RunSpec, console: Console
) -> ClassStatistics:
    """Class counts of the source: all of it for rare-class sampling, else a sample.

    Raises DataError where no label shows a class of the pairing.
    """
    skip = run.recipe.on_bad_image == "skip"
    if run.recipe.rare_classes is None:
        sampled = class_statistics(thinned(source, COUNTED), skip_unreadable=skip)
        if class_map.statistics(sampled).pixels.any():
            return sampled
    with console.task("counting classes", len(source)) as task:
        counted = class_statistics(
            source,
            _cache(console),
            lambda done, total: task.advance(done - task.done),
            workers=min(8, os.cpu_count() or 1),
            skip_unreadable=skip,
        )
    if not class_map.statistics(counted).pixels.any():
        raise DataError(
            f"dataset '{run.source.name}': none of its {len(source)} labels shows a class of the "
            "pairing, every pixel is ignored; check its labels and how they are mapped "
            "(mfuser data check)"
        )
    return counted


def _cache(console: Console) -> Path | None:
    """Where class counts are kept; None, and a warning, where nothing can be."""
    folder = cache_folder()
    reason = "this user has no home folder" if folder is None else unwritable(folder)
    if reason is None:
        return folder
    console.say(
        f"class counts are not kept for the next run: {reason}; set {CACHE} to a folder that can "
        "be written"
    )
    return None


def sampler(
    source: Dataset, recipe: RecipeSpec, statistics: ClassStatistics
) -> RareClassSampler | ShuffledSampler:
    rare = recipe.rare_classes
    if rare is None:
        return ShuffledSampler(len(source))
    return RareClassSampler(statistics, rare.temperature, rare.min_pixels)


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
    """Raises DataError where the first crops of a run show ignored pixels alone."""
    if start:
        return
    for slot in range(TRIES):
        crop = stream.crops[slot]
        if isinstance(crop, MFuserError) or (crop[1] != IGNORE).any():
            return  # an image that cannot be used is reported when its turn comes
    height, width = run.pairing.image_size
    raise DataError(
        f"dataset '{run.source.name}': its first {TRIES} crops of {height}x{width} (height x "
        "width) show no class of the pairing, every pixel is ignored; check its labels and how "
        "they are mapped (mfuser data check), or take larger crops (--set image_size=…)"
    )
