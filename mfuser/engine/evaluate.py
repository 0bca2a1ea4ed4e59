"""Evaluation on several domains at once, scored in the labels' own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry
from mfuser.config.run import Domain, RunSpec
from mfuser.data.loading import ClassMap
from mfuser.engine import compiling
from mfuser.engine.checkpoints import load_model
from mfuser.engine.console import Console
from mfuser.engine.gallery import Shown, save_pictures
from mfuser.engine.inference import Asked, asked, split
from mfuser.engine.measure import Measured, Protocol, measure, text_of
from mfuser.engine.metrics import scores
from mfuser.engine.precision import Choice, Precision
from mfuser.engine.processes import Processes, processes
from mfuser.errors import MFuserError
from mfuser.files import check_writable
from mfuser.interfaces import Dataset
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel
from mfuser.model.window_batch import WindowBatch
from mfuser.reporting.report import CalibrationResult, DomainResult, Report

PICTURES = 3
"""Images of each domain that are drawn beside their truth."""


def evaluate(
    registry: Registry,
    path: Path,
    *,
    targets: Sequence[Domain] | None = None,
    settings: Sequence[str] = (),
    device: str | None = None,
    inference: str | None = None,
    stride: tuple[int, int] | None = None,
    window_batch: WindowBatch | None = None,
    limit: int | None = None,
    baselines: bool = False,
    pictures: Path | None = None,
    weights: str | None = None,
    workers: int | None = None,
    compile: bool = False,
    precision: Choice = "auto",
    console: Console | None = None,
    joined: Processes | None = None,
) -> Report:
    """Score a run (or a checkpoint file) on its targets, or on others.

    settings: of the pairing, and of the inference ("inference.scales=[1.0]"). inference, stride,
    window_batch: in place of the recipe's. workers: as in `Protocol`.
    baselines: also score the untrained model. limit: only the first so many images of a domain.
    pictures: a folder for panels beside the truth, one per domain. weights: which of the run's
    (see `load_model`). compile: by torch.compile, as the settings say ("compile.mode=…").
    precision: see `Precision.of_inference`. joined: the processes of the surrounding command. The
    report is returned, not saved.
    """
    console = console or Console()
    with processes(device=device, joined=joined) as group:
        own, others = split(settings)
        compilation, others = compiling.asked(compile, others)
        model, checkpoint = group.together(lambda: load_model(path, registry, others, weights))
        if compilation is not None:
            compiling.compile_parts(model, compilation, console.say)
        run = RunSpec.read(registry, checkpoint.meta["run"], f"{path}: its record of the run")
        recipe = run.recipe
        asked_for = asked(
            registry,
            recipe.inference,
            recipe.stride,
            name=inference,
            settings=own,
            stride=stride,
            window_batch=window_batch,
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
            workers=workers,
            precision=precision,
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
    workers: int | None = None,
    precision: Choice = "auto",
    console: Console,
) -> Report:
    """`evaluate` for a model at hand, as it is after `step` steps of `run`; the same report in
    every process. inference: in place of the recipe's. weights: what `Checkpoint.meta` says of
    them; None: the last ones. workers: as in `Protocol`."""
    console.quiet = console.quiet or not group.main
    recipe = run.recipe
    inference = inference or Asked(recipe.inference, recipe.stride)
    device = group.accelerator.device
    how = Precision.of_inference(device, run.model_dump(mode="json"), precision)
    protocol = Protocol(
        how.around(inference.build()),
        limit or recipe.test_images,
        recipe.on_bad_image == "skip",
        workers,
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
        how.prepare(candidate)
        text = group.together(partial(text_of, candidate))
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
                text=text,
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
        precision=str(how),
        pictures=shown,
    )


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
