"""Validation while a model trains: on images of its source that training never sees.

On a target only where the recipe names it; what is chosen so is then said in every report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mfuser.config.registry import Registry
from mfuser.config.run import Domain, RunSpec, domains
from mfuser.data.images import UnreadableImage
from mfuser.data.parts import divided, thinned
from mfuser.engine import checkpoints
from mfuser.engine.averaging import Averages, as_saved
from mfuser.engine.console import Console
from mfuser.engine.evaluate import scored_classes
from mfuser.engine.inference import Asked
from mfuser.engine.measure import Measured, Protocol, measure, test_scale
from mfuser.engine.metrics import scores
from mfuser.engine.precision import Precision
from mfuser.engine.processes import Processes
from mfuser.errors import CheckpointError, DataError, MFuserError, NoSplitError, placed
from mfuser.interfaces import Dataset
from mfuser.model.dgss import DGSSModel
from mfuser.model.sliding_window import check_window

SHARE = 10
"""A source without a val split keeps at least this many images for each that it gives up."""
EXAMPLES = 3
"""Images that are drawn each time."""


@dataclass(frozen=True)
class Kept:
    """The images that a run is measured on while it trains. target: of another domain."""

    dataset: Dataset
    name: str
    target: bool = False


def described(kept: Sequence[Kept]) -> str:
    """ "held-out images of gta and synthia", or a target's name."""
    names = " and ".join(one.name for one in kept)
    return names if any(one.target for one in kept) else f"held-out images of {names}"


@dataclass(frozen=True)
class Example:
    """Colored masks (H, W, 3) beside their image; predictions are void where the truth is."""

    name: str
    image: np.ndarray
    target: np.ndarray
    prediction: np.ndarray


@dataclass(frozen=True)
class Seen:
    """The figures of a step, in [0, 1]; of several sources, their means. on: what they were
    measured on. domains: mIoU of each. best: none was better."""

    step: int
    on: str
    images: int
    miou: float
    accuracy: float
    iou: dict[str, float]
    domains: dict[str, float]
    examples: list[Example]
    best: bool = False

    def as_dict(self) -> dict[str, Any]:
        table = {key: value for key, value in vars(self).items() if key not in ("step", "examples")}
        return (
            table if len(self.domains) > 1 else {k: v for k, v in table.items() if k != "domains"}
        )


def keep_back(
    registry: Registry, run: RunSpec, sources: Sequence[Dataset], image_size: tuple[int, int]
) -> tuple[list[Dataset], list[Kept]]:
    """Splits each source into images to train on and images to measure the run on.

    A source's own val split, else some of its images, which are then not trained on. Raises
    DataError where there are none, or where the first one is smaller than the window.
    """
    recipe, left = run.recipe, list(sources)
    if recipe.validate_every is None:
        return left, []
    kept = _named(registry, run)
    if not kept:
        for k, domain in enumerate(run.sources):
            left[k], held_out = _held_out(registry, domain, left[k], recipe.validate_images)
            kept.append(Kept(held_out, domain.name))
    kept = [replace(one, dataset=thinned(one.dataset, recipe.validate_images)) for one in kept]
    for one in kept:
        try:
            image = one.dataset[0].image
            if recipe.inference is None:  # others say it where they are asked
                check_window(test_scale(image, one.dataset.test_size).shape[:2], image_size)
        except UnreadableImage:
            pass  # fatal or skipped, as the recipe says, where it is measured
        except MFuserError as error:
            raise placed(error, f"validate_every: {one.name}: {one.dataset.name(0)}") from error
    return left, kept


def _held_out(
    registry: Registry, domain: Domain, source: Dataset, count: int
) -> tuple[Dataset, Dataset]:
    """A source without what it is measured on, and that."""
    own = _val_split(registry, domain)
    if own is not None:
        return source, own
    if len(source) < 2:
        raise DataError(
            f"validate_every: dataset '{domain.name}' has one image and no val split, so that "
            "nothing can be held out; leave it out, or name a dataset by validate_on"
        )
    return divided(source, min(count, max(1, len(source) // SHARE)))


def _named(registry: Registry, run: RunSpec) -> list[Kept]:
    """The domain that `validate_on` names, unless it is a source."""
    name = run.recipe.validate_on
    if name is None:
        return []
    try:
        found = domains(registry, name)
        if len(found) != 1:
            names = ", ".join(d.name for d in found)
            raise DataError(f"{name} stands for {len(found)} domains ({names}); name one")
        if any(found[0].same_images(source) for source in run.sources):
            return []
        return [Kept(found[0].build(registry, "val"), found[0].name, target=True)]
    except MFuserError as error:
        raise placed(error, "validate_on") from error


def _val_split(registry: Registry, source: Domain) -> Dataset | None:
    """The source's own, unless it has none or is what the run trains on."""
    spec = source.spec
    if spec is None or spec.split == "val":
        return None
    try:
        free = source.model_copy(update={"spec": spec.model_copy(update={"split": None})})
        return free.build(registry, "val")
    except NoSplitError:
        return None


class Validator:
    """Measures, and remembers the best: its weights are a file of the run's folder."""

    def __init__(
        self,
        kept: Sequence[Kept],
        model: DGSSModel,
        averages: Averages | None,
        run: RunSpec,
        folder: Path,
        group: Processes,
        console: Console,
    ) -> None:
        self.kept, self.model, self.averages, self.run = kept, model, averages, run
        self.folder, self.group, self.console = folder, group, console
        self.scored = {
            one.name: scored_classes(model, run, run.recipe, one.name, one.dataset) for one in kept
        }
        self.best = -1.0

    def resume(self) -> None:
        """Remember the best so far. A damaged file is that of no step: a later one replaces it."""

        def known() -> float:
            try:
                found = checkpoints.read(self.folder / checkpoints.BEST).meta
                return float(found["weights"]["miou"])
            except (CheckpointError, KeyError):
                return -1.0

        self.best = self.group.from_main(known)

    def due(self, done: int) -> bool:
        """After so many steps? After the last one always."""
        every = self.run.recipe.validate_every
        return every is not None and (done % every == 0 or done == self.run.recipe.steps)

    def __call__(
        self, step: int, write: Callable[[dict[str, Tensor], dict[str, Any]], None]
    ) -> Seen:
        """Measure the weights after `step`, as they would be saved; all processes share the images.

        write: called with the trained tensors and what a report says of them, by the first
        process, if they are the best so far.
        """
        with as_saved(self.model, self.averages, self.group) as tensors:
            found = [self._measure(one) for one in self.kept]
            seen = self._seen(step, found)
            if seen.best:
                self.best = seen.miou
                weights = {
                    "kind": "best",
                    "miou": seen.miou,
                    "on": seen.on,
                    "target": next((one.name for one in self.kept if one.target), None),
                    "averaged": self.averages is not None,
                }
                self.group.from_main(lambda: write(tensors, weights))
        best = " (the best so far)" if seen.best else ""
        on = seen.on if seen.on.startswith("held-out") else f"images of {seen.on}"
        self.console.say(f"step {step}: mIoU {seen.miou:.1%} on {seen.images} {on}{best}")
        return seen

    def _measure(self, one: Kept) -> Measured:
        recipe = self.run.recipe
        how = Precision.of_inference(
            self.group.accelerator.device, {"recipe": recipe.model_dump(mode="json")}
        )
        inference = how.around(Asked(recipe.inference, recipe.stride).build())
        return measure(
            self.model,
            one.dataset,
            self.scored[one.name],
            Protocol(inference, None, recipe.on_bad_image == "skip"),
            self.group,
            pictures=EXAMPLES,
            label=one.name,
            console=Console(quiet=True),  # one bar at a time
        )

    def _name(self, kept: Kept, index: int) -> str:
        """The name of an image, with its source where there are several."""
        name = kept.dataset.name(index)
        return f"{kept.name}: {name}" if len(self.kept) > 1 else name

    def _seen(self, step: int, found: Sequence[Measured]) -> Seen:
        figures = [scores(one.confusion.counts, one.scored) for one in found]
        known = {
            name: [float(f.iou[k]) for f in figures if np.isfinite(f.iou[k])]
            for k, name in enumerate(self.model.classes)
        }
        miou = float(np.mean([f.miou for f in figures]))
        return Seen(
            step,
            described(self.kept),
            sum(one.images - len(one.skipped) for one in found),
            miou,
            float(np.mean([f.accuracy for f in figures])),
            {name: float(np.mean(values)) for name, values in known.items() if values},
            {one.name: f.miou for one, f in zip(self.kept, figures, strict=True)},
            [
                Example(self._name(kept, index), image, target, prediction)
                for kept, one in zip(self.kept, found, strict=True)
                for index, (image, target, _, prediction) in one.pictures
            ],
            miou > self.best,
        )
