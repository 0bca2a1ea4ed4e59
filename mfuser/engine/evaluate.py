"""Evaluation on several domains at once, scored in the labels' own size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry
from mfuser.config.run import Domain, RunSpec
from mfuser.data.images import UnreadableImage
from mfuser.data.loading import ClassMap
from mfuser.engine.checkpoints import load_model
from mfuser.engine.console import Console, Task
from mfuser.engine.decision import decide
from mfuser.engine.exhaustion import explained
from mfuser.engine.gallery import Gallery, Shown, panel, save_pictures
from mfuser.engine.inference import Asked, asked, split
from mfuser.engine.metrics import Calibration, Confusion, scores
from mfuser.engine.processes import Processes, processes
from mfuser.errors import DataError, MFuserError, placed
from mfuser.files import check_writable
from mfuser.inference import Inference
from mfuser.interfaces import IGNORE, Dataset, Sample
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel
from mfuser.reporting import draw
from mfuser.reporting.report import CalibrationResult, DomainResult, Report

SMALLER = "test_size of the dataset in the registry; --device cpu where there is more memory"
"""What helps where memory runs out."""
TOGETHER = 4
"""Images of one size that are segmented in one pass."""
PICTURES = 3
"""Images of each domain that are drawn beside their truth."""


@dataclass
class Measured:
    """Of one domain. confusion: (K, K) counts. pictures: rows of image, truth and prediction, with
    the image's index."""

    confusion: Confusion
    scored: tuple[int, ...]
    images: int
    skipped: list[str]
    pictures: list[tuple[int, list[np.ndarray]]]
    calibration: Calibration
    gallery: Gallery


@dataclass(frozen=True)
class Protocol:
    """How every domain is measured. limit: only the first so many images."""

    inference: Inference
    limit: int | None
    skip_unreadable: bool


def evaluate(
    registry: Registry,
    path: Path,
    *,
    targets: Sequence[Domain] | None = None,
    settings: Sequence[str] = (),
    device: str | None = None,
    inference: str | None = None,
    stride: tuple[int, int] | None = None,
    limit: int | None = None,
    baselines: bool = False,
    pictures: Path | None = None,
    weights: str | None = None,
    console: Console | None = None,
    joined: Processes | None = None,
) -> Report:
    """Score a run (or a checkpoint file) on its targets, or on others.

    settings: of the pairing, and of the inference ("inference.scales=[1.0]"). inference, stride: in
    place of the recipe's.
    baselines: also score the untrained model. limit: only the first so many images of a domain.
    pictures: a folder for panels beside the truth, one per domain. weights: which of the run's
    (see `load_model`). joined: the processes of the
    surrounding command. The report is returned, not saved.
    """
    console = console or Console()
    with processes(device=device, joined=joined) as group:
        own, others = split(settings)
        model, checkpoint = group.together(lambda: load_model(path, registry, others, weights))
        run = RunSpec.read(registry, checkpoint.meta["run"], f"{path}: its record of the run")
        recipe = run.recipe
        asked_for = asked(
            registry, recipe.inference, recipe.stride, name=inference, settings=own, stride=stride
        )
        return assess(
            registry,
            model,
            run,
            checkpoint.step,
            group,
            targets=targets,
            inference=asked_for,
            limit=limit,
            baselines=baselines,
            pictures=pictures,
            weights=checkpoint.meta.get("weights"),
            console=console,
        )


def assess(
    registry: Registry,
    model: DGSSModel,
    run: RunSpec,
    step: int,
    group: Processes,
    *,
    targets: Sequence[Domain] | None = None,
    inference: Asked | None = None,
    limit: int | None = None,
    baselines: bool = False,
    pictures: Path | None = None,
    weights: Mapping[str, Any] | None = None,
    console: Console,
) -> Report:
    """`evaluate` for a model at hand, as it is after `step` steps of `run`; the same report in
    every process. inference: in place of the recipe's. weights: what `Checkpoint.meta` says of
    them; None: the last ones."""
    console.quiet = console.quiet or not group.main
    recipe = run.recipe
    inference = inference or Asked(recipe.inference, recipe.stride)
    protocol = Protocol(
        inference.build(), limit or recipe.test_images, recipe.on_bad_image == "skip"
    )
    chosen = list(targets if targets is not None else run.targets)
    if not chosen:
        raise MFuserError("there is no target to evaluate on: give --targets, e.g. cityscapes")
    if pictures is not None:
        group.from_main(lambda: check_writable(pictures))
    datasets = group.together(lambda: {d.name: d.build(registry, "val") for d in chosen})
    scored = {n: scored_classes(model, run, recipe, n, d) for n, d in datasets.items()}
    rows = {"trained": model}
    if baselines:
        rows["untrained"] = group.together(lambda: build_model(model.spec, seed=run.seed))
    seen = {d.name for d in chosen if any(d.same_images(s) for s in run.sources)}
    results: dict[str, dict[str, DomainResult]] = {}
    panels: dict[str, list[list[np.ndarray]]] = {}
    shown: dict[str, list[Shown]] = {}
    for row, candidate in rows.items():
        candidate.to(group.accelerator.device)
        results[row] = {}
        for name, dataset in datasets.items():
            trained = row == "trained"
            measured = measure(
                candidate,
                dataset,
                scored[name],
                protocol,
                group,
                pictures=PICTURES if trained and pictures is not None else 0,
                label=name if trained else f"{name} (untrained)",
                console=console,
            )
            if trained:
                panels[name] = [rows for _, rows in measured.pictures]
                shown[name] = measured.gallery.shown
            result = _result(model.classes, measured, name in seen, run)
            unlabeled = _unlabeled(model.classes, dataset, scored[name])
            results[row][name] = result.model_copy(update={"unlabeled": unlabeled})
    if pictures is not None:
        group.from_main(lambda: save_pictures(pictures, model.classes, panels))
    return Report.of(
        model,
        run,
        step,
        results["trained"],
        untrained={n: r.miou for n, r in results.get("untrained", {}).items()},
        inference=inference.record(model.spec.image_size),
        limit=protocol.limit,
        weights=weights,
        pictures=shown,
    )


def measure(
    model: DGSSModel,
    dataset: Dataset,
    scored: tuple[int, ...],
    protocol: Protocol,
    group: Processes,
    *,
    pictures: int,
    label: str,
    console: Console,
) -> Measured:
    """One domain; every process takes its share of the images, and all have the whole result."""
    count = min(len(dataset), protocol.limit or len(dataset))
    drawn = set(np.linspace(0, count - 1, min(pictures, count), dtype=int).tolist())
    mine = range(group.rank, count, group.count)
    with console.task(label, len(mine)) as task:
        share = _Share(model, dataset, scored, drawn, label)
        group.together(lambda: share.work(mine, protocol, group.accelerator.device, task))
    share.confusion.counts = np.sum(group.gathered([share.confusion.counts]), axis=0)
    share.calibration.sums = np.sum(group.gathered([share.calibration.sums]), axis=0)
    share.gallery.extend(group.gathered(share.gallery.scores), group.gathered(share.gallery.shown))
    if not share.confusion.counts.any():
        raise DataError(f"{label}: no pixel of its {count} images carries a scored class")
    # In the order of the images, whichever process had them.
    skipped = dict(sorted(group.gathered(share.skipped)))
    drawings = sorted(group.gathered(share.pictures), key=lambda drawing: drawing[0])
    return Measured(
        share.confusion,
        scored,
        count,
        list(skipped.values()),
        drawings,
        share.calibration,
        share.gallery,
    )


class _Share:
    """One process's part of a domain; what it finds of single images goes with their index."""

    def __init__(
        self,
        model: DGSSModel,
        dataset: Dataset,
        scored: tuple[int, ...],
        drawn: set[int],
        label: str,
    ) -> None:
        self.model, self.dataset, self.scored = model, dataset, scored
        self.drawn, self.label = drawn, label
        self.class_map = ClassMap(dataset, model.classes)
        self.confusion = Confusion(len(model.classes))
        self.calibration = Calibration()
        self.gallery = Gallery()
        self.text: Tensor | None = None
        self.skipped: list[tuple[int, str]] = []
        self.pictures: list[tuple[int, list[np.ndarray]]] = []

    def work(
        self, mine: Sequence[int], protocol: Protocol, device: torch.device, task: Task
    ) -> None:
        table = draw.palette(self.model.classes)
        with torch.no_grad():  # once for all images: nothing changes it here
            self.text = self.model.text() if self.model.encoder.vlm is not None else None
        for batch in _same_size(self.dataset, mine, protocol.skip_unreadable, self.skipped):
            for (index, sample), one in zip(
                batch, self._scores(batch, protocol.inference, device), strict=True
            ):
                truth = self.class_map(sample.label, sample.name)
                truth[~np.isin(truth, self.scored)] = IGNORE
                prediction, confidence = decide(
                    one, sample.label.shape, self.scored, self.model.decoder.scores
                )
                self.confusion.add(truth, prediction)
                self.calibration.add(truth, prediction, confidence)
                self.gallery.add(
                    index,
                    sample.name,
                    sample.image,
                    truth,
                    prediction,
                    self.scored,
                    len(self.model.classes),
                )
                if index in self.drawn:
                    self.pictures.append((index, panel(sample.image, truth, prediction, table)))
            task.advance(len(batch))

    def _scores(
        self,
        batch: list[tuple[int, Sample]],
        inference: Inference,
        device: torch.device,
    ) -> Tensor:
        for _, s in batch:
            if s.image.shape[:2] != s.label.shape:
                raise DataError(
                    f"{s.name}: the label is {s.label.shape[1]}x{s.label.shape[0]}, the image "
                    f"{s.image.shape[1]}x{s.image.shape[0]} (width x height): not equal"
                )
        images = [test_scale(s.image, self.dataset.test_size) for _, s in batch]
        size = images[0].shape[:2]
        try:
            with explained(inference, size, len(self.model.classes), SMALLER):
                stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
                return self.model.segment_by(inference, stack, text=self.text)
        except MFuserError as error:
            raise placed(error, f"{self.label}, {batch[0][1].name}") from error


def test_scale(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize to fit (width, height) keeping the ratio, as mmsegmentation's keep_ratio does."""
    if size is None:
        return image
    height, width = image.shape[:2]
    factor = min(max(size) / max(height, width), min(size) / min(height, width))
    to = (int(width * factor + 0.5), int(height * factor + 0.5))
    return image if to == (width, height) else cv2.resize(image, to, interpolation=cv2.INTER_LINEAR)


def _same_size(
    dataset: Dataset, indices: Sequence[int], skip: bool, skipped: list[tuple[int, str]]
) -> Iterator[list[tuple[int, Sample]]]:
    """Consecutive samples of one size, up to TOGETHER at a time."""
    batch: list[tuple[int, Sample]] = []
    for index in indices:
        try:
            sample = dataset[index]
        except UnreadableImage:
            if not skip:
                raise
            skipped.append((index, dataset.name(index)))
            continue
        if batch and (len(batch) == TOGETHER or batch[0][1].image.shape != sample.image.shape):
            yield batch
            batch = []
        batch.append((index, sample))
    if batch:
        yield batch


def scored_classes(
    model: DGSSModel, run: RunSpec, recipe: RecipeSpec, name: str, dataset: Dataset
) -> tuple[int, ...]:
    """Ids of the classes that are scored (`RecipeSpec.scored`)."""
    shared = ClassMap(dataset, model.classes).shared
    if recipe.scored == "all":
        return tuple(range(len(model.classes)))
    if recipe.scored == "shared":
        shared = tuple(k for k in shared if model.classes[k] in run.source_classes)
    if not shared:
        raise MFuserError(f"target '{name}' shares no class with the source '{run.source_names}'")
    return shared


def _unlabeled(classes: tuple[str, ...], dataset: Dataset, scored: tuple[int, ...]) -> list[str]:
    """Scored classes that no label of the target can show."""
    labeled = ClassMap(dataset, classes).shared
    return [classes[k] for k in scored if k not in labeled]


def _result(classes: tuple[str, ...], measured: Measured, seen: bool, run: RunSpec) -> DomainResult:
    trained = scores(measured.confusion.counts, measured.scored)
    constant = None
    if run.most_frequent in classes:
        counts = np.zeros_like(measured.confusion.counts)
        counts[:, classes.index(run.most_frequent)] = measured.confusion.counts.sum(1)
        constant = scores(counts, measured.scored).miou
    return DomainResult(
        miou=trained.miou,
        accuracy=trained.accuracy,
        iou={n: float(v) for n, v in zip(classes, trained.iou, strict=True) if np.isfinite(v)},
        images=measured.images - len(measured.skipped),
        scored=[classes[k] for k in measured.scored],
        seen=seen,
        most_frequent=constant,
        skipped=measured.skipped,
        confusion=measured.confusion.counts.tolist(),
        calibration=CalibrationResult(
            bins=measured.calibration.sums.tolist(), ece=measured.calibration.error
        ),
        per_image=[score for _, score in measured.gallery.scores],
    )
