"""Evaluation on several domains at once, by sliding window, scored in the labels' own size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry
from mfuser.config.run import Domain, RunSpec
from mfuser.data.images import UnreadableImage
from mfuser.data.loading import ClassMap
from mfuser.engine.checkpoints import load_model
from mfuser.engine.console import Console
from mfuser.engine.metrics import Confusion, scores
from mfuser.errors import DataError, MFuserError, placed
from mfuser.files import check_writable
from mfuser.interfaces import IGNORE, Dataset, Sample
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel
from mfuser.model.sliding_window import default_stride
from mfuser.reporting import draw
from mfuser.reporting.report import DomainResult, Report

TOGETHER = 4
"""Images of one size that are segmented in one pass."""
PICTURES = 3
"""Images of each domain that are drawn beside their truth."""


@dataclass
class Measured:
    """confusion: (K, K). pictures: rows of image, truth and prediction overlays."""

    confusion: Confusion
    scored: tuple[int, ...]
    images: int
    skipped: list[str] = field(default_factory=list)
    pictures: list[list[np.ndarray]] = field(default_factory=list)


def evaluate(
    registry: Registry,
    path: Path,
    *,
    targets: Sequence[Domain] | None = None,
    settings: Sequence[str] = (),
    device: str | None = None,
    stride: tuple[int, int] | None = None,
    limit: int | None = None,
    baselines: bool = False,
    pictures: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Score a run (or a checkpoint file) on its targets, or on others.

    baselines: also score the untrained model. limit: only the first so many images of a domain.
    pictures: a folder for panels beside the truth, one per domain.
    """
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=device == "cpu")
    console = console or Console()
    console.quiet = console.quiet or not accelerator.is_main_process
    model, checkpoint = load_model(path, registry, list(settings))
    run = RunSpec.read(registry, checkpoint.meta["run"], f"{path}: its record of the run")
    recipe = run.recipe
    chosen = list(targets if targets is not None else run.targets)
    if not chosen:
        raise MFuserError("there is no target to evaluate on: give --targets, e.g. cityscapes")
    stride = stride or recipe.stride
    limit = limit or recipe.test_images
    if pictures is not None and accelerator.is_main_process:
        check_writable(pictures)
    datasets = {domain.name: domain.build(registry, "val") for domain in chosen}
    scored = {n: _scored_classes(model, run, recipe, n, d) for n, d in datasets.items()}
    rows = {"trained": model}
    if baselines:
        rows["untrained"] = build_model(model.spec, seed=run.seed)
    seen = {d.name for d in chosen if _same_images(d, run.source)}
    results: dict[str, dict[str, DomainResult]] = {}
    overview: dict[str, list[list[np.ndarray]]] = {}
    for row, candidate in rows.items():
        candidate.to(accelerator.device)
        results[row] = {}
        for name, dataset in datasets.items():
            label = name if row == "trained" else f"{name} (untrained)"
            measured = measure(
                candidate,
                dataset,
                scored[name],
                accelerator=accelerator,
                stride=stride,
                limit=limit,
                pictures=PICTURES if row == "trained" and pictures is not None else 0,
                skip_unreadable=recipe.on_bad_image == "skip",
                label=label,
                console=console,
            )
            if pictures is not None and row == "trained" and accelerator.is_main_process:
                save_panels(pictures / picture(name), model.classes, {name: measured.pictures})
                overview[name] = measured.pictures[:1]
            result = _result(model.classes, measured, name in seen, run)
            result.unlabeled = _unlabeled(model.classes, dataset, scored[name])
            results[row][name] = result
    if pictures is not None and accelerator.is_main_process:
        save_panels(pictures / "overview.png", model.classes, overview)
    accelerator.end_training()
    return Report.of(
        model,
        run,
        checkpoint.step,
        results["trained"],
        untrained={n: r.miou for n, r in results.get("untrained", {}).items()},
        stride=stride or default_stride(model.spec.image_size),
        limit=limit,
    )


def measure(
    model: DGSSModel,
    dataset: Dataset,
    scored: tuple[int, ...],
    *,
    accelerator: Accelerator,
    stride: tuple[int, int] | None,
    limit: int | None,
    pictures: int,
    skip_unreadable: bool,
    label: str,
    console: Console,
) -> Measured:
    """The confusion matrix of one domain; every process takes its share of the images."""
    class_map = ClassMap(dataset, model.classes)
    count = min(len(dataset), limit or len(dataset))
    result = Measured(Confusion(len(model.classes)), scored, count)
    drawn = set(np.linspace(0, count - 1, min(pictures, count), dtype=int).tolist())
    table = draw.palette(model.classes)
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    with console.task(label, len(mine)) as task:
        for batch in _same_size(dataset, mine, skip_unreadable, result.skipped):
            for _, s in batch:
                if s.image.shape[:2] != s.label.shape:
                    raise DataError(
                        f"{s.name}: the label is {s.label.shape[1]}x{s.label.shape[0]}, the image "
                        f"{s.image.shape[1]}x{s.image.shape[0]} (width x height): not equal"
                    )
            images = [test_scale(s.image, dataset.test_size) for _, s in batch]
            stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(accelerator.device)
            try:
                class_scores = model.segment(stack, stride=stride)
            except MFuserError as error:
                raise placed(error, f"{label}, {batch[0][1].name}") from error
            for (index, sample), one in zip(batch, class_scores, strict=True):
                truth = class_map(sample.label, sample.name)
                truth[~np.isin(truth, scored)] = IGNORE
                prediction = predict_ids(one, sample.label.shape, scored)
                result.confusion.add(truth, prediction)
                if index in drawn:
                    result.pictures.append(_panel(sample.image, truth, prediction, table))
            task.advance(len(batch))
    total = torch.from_numpy(result.confusion.counts).to(accelerator.device)
    result.confusion.counts = accelerator.reduce(total, "sum").cpu().numpy()
    if not result.confusion.counts.any():
        raise DataError(f"{label}: no pixel of its {count} images carries a scored class")
    return result


def predict_ids(
    class_scores: Tensor, size: tuple[int, ...], scored: Sequence[int] | None = None
) -> np.ndarray:
    """Scores (K, H, W) -> class ids (size), the best among `scored`."""
    if class_scores.shape[-2:] != torch.Size(size):
        class_scores = F.interpolate(
            class_scores[None], (size[0], size[1]), mode="bilinear", align_corners=False
        )[0]
    if scored is None or len(scored) == len(class_scores):
        return class_scores.argmax(0).cpu().numpy()
    chosen = torch.as_tensor(scored, device=class_scores.device)
    return chosen[class_scores[chosen].argmax(0)].cpu().numpy()


def test_scale(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize to fit (width, height) keeping the ratio, as mmsegmentation's keep_ratio does."""
    if size is None:
        return image
    height, width = image.shape[:2]
    factor = min(max(size) / max(height, width), min(size) / min(height, width))
    to = (int(width * factor + 0.5), int(height * factor + 0.5))
    return image if to == (width, height) else cv2.resize(image, to, interpolation=cv2.INTER_LINEAR)


def _same_size(
    dataset: Dataset, indices: Sequence[int], skip: bool, skipped: list[str]
) -> Iterator[list[tuple[int, Sample]]]:
    """Consecutive samples of one size, up to TOGETHER at a time."""
    batch: list[tuple[int, Sample]] = []
    for index in indices:
        try:
            sample = dataset[index]
        except UnreadableImage:
            if not skip:
                raise
            skipped.append(dataset.name(index))
            continue
        if batch and (len(batch) == TOGETHER or batch[0][1].image.shape != sample.image.shape):
            yield batch
            batch = []
        batch.append((index, sample))
    if batch:
        yield batch


def _scored_classes(
    model: DGSSModel, run: RunSpec, recipe: RecipeSpec, name: str, dataset: Dataset
) -> tuple[int, ...]:
    """Ids of the classes that are scored (`RecipeSpec.scored`)."""
    shared = ClassMap(dataset, model.classes).shared
    if recipe.scored == "all":
        return tuple(range(len(model.classes)))
    if recipe.scored == "shared":
        shared = tuple(k for k in shared if model.classes[k] in run.source_classes)
    if not shared:
        raise MFuserError(f"target '{name}' shares no class with the source '{run.source.name}'")
    return shared


def _unlabeled(classes: tuple[str, ...], dataset: Dataset, scored: tuple[int, ...]) -> list[str]:
    """Scored classes that no label of the target can show."""
    labeled = ClassMap(dataset, classes).shared
    return [classes[k] for k in scored if k not in labeled]


def _same_images(one: Domain, other: Domain) -> bool:
    """Whether two domains are one, whatever part of it is read and how."""
    if one.name == other.name:
        return True
    if one.spec is None or other.spec is None:
        return False
    read_alike = {"split": None, "test_size": None}
    return one.spec.model_copy(update=read_alike) == other.spec.model_copy(update=read_alike)


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
    )


def _panel(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, table: np.ndarray
) -> list[np.ndarray]:
    return [
        image,
        draw.color(truth, table),
        draw.overlay(image, prediction, table),
        draw.color(np.where(truth == IGNORE, IGNORE, prediction), table),
    ]


COLUMNS = ("image", "truth", "prediction over image", "prediction")


def picture(domain: str) -> str:
    """The file of a domain's panels."""
    return re.sub(r"[^\w.+-]", "-", domain) + ".png"


def save_panels(
    path: Path, classes: tuple[str, ...], drawn: dict[str, list[list[np.ndarray]]]
) -> None:
    """Image, truth, overlay and prediction (void as in the truth), row by row, with a legend."""
    rows = [row for domain in drawn.values() for row in domain]
    if not rows:
        return
    names = [name for name, domain in drawn.items() for _ in domain]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = draw.panels(rows, COLUMNS, names=names)
    draw.stacked(sheet, draw.legend(classes, draw.palette(classes), sheet.width)).save(path)
