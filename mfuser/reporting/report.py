"""The report of an evaluation, as a table, JSON, Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BeforeValidator, ConfigDict, PrivateAttr, ValidationError

from mfuser.config.recipe import RecipeSpec
from mfuser.config.run import RunSpec
from mfuser.errors import CheckpointError, brief
from mfuser.files import write_json, write_text
from mfuser.model.dgss import DGSSModel
from mfuser.reporting.tables import Table, csv_text, document
from mfuser.specs import Options
from mfuser.version import __version__

SCORED = {
    "target": "those that each target labels",
    "shared": "those that source and target both label",
    "all": "all of the pairing's",
}
"""The classes that count, by `RecipeSpec.scored`, as a report's protocol says it."""


REPORT = "report.json"

Score = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""In [0, 1]; NaN where there is none, which is null in a file."""


class ImageScore(Options):
    """The score of one image, in [0, 1]: mIoU over the classes in its target or prediction."""

    model_config = ConfigDict(allow_inf_nan=True)

    name: str
    miou: Score
    accuracy: Score


class CalibrationResult(Options):
    """bins: pixels, sum of confidence and hits of each of the equal bins of confidence.
    ece: expected calibration error, in [0, 1]."""

    model_config = ConfigDict(allow_inf_nan=True)

    bins: list[list[float]]
    ece: Score


class DomainResult(Options):
    """Scores of one domain, in [0, 1]. seen: it is the source. scored: classes that count;
    unlabeled: those of them that the domain never shows, 0 where they are predicted.
    most_frequent: mIoU of predicting the source's most frequent class everywhere."""

    model_config = ConfigDict(allow_inf_nan=True)

    miou: Score
    accuracy: Score
    iou: dict[str, Score]
    images: int
    scored: list[str]
    unlabeled: list[str] = []
    seen: bool
    most_frequent: float | None = None
    skipped: list[str] = []
    confusion: list[list[int]] = []
    """Pixels by target class (row) and predicted class (column), in the order of the classes."""
    calibration: CalibrationResult | None = None
    per_image: list[ImageScore] = []


class Picture(Protocol):
    """An image to look at, as `engine.gallery` keeps it, its files as base64: photo a JPEG, target
    and prediction PNGs of class ids."""

    @property
    def score(self) -> ImageScore: ...
    @property
    def photo(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def prediction(self) -> str: ...


class Report(Options):
    """Measured figures and their protocol, without which they mean nothing."""

    model_config = ConfigDict(allow_inf_nan=True)

    pairing: str
    recipe: str
    protocol: dict[str, Any]
    notes: list[str]
    classes: list[str]
    domains: dict[str, DomainResult]
    untrained: dict[str, Score]
    average: float | None
    """mIoU averaged over the unseen domains."""
    gap: float | None
    """Source minus that average, where the source was scored too; of several sources their mean."""
    _pictures: dict[str, Sequence[Picture]] = PrivateAttr(default_factory=dict)

    @property
    def pictures(self) -> dict[str, Sequence[Picture]]:
        """Domain -> images to look at, the worst first; a report read from a file has none."""
        return self._pictures

    @staticmethod
    def of(
        model: DGSSModel,
        run: RunSpec,
        step: int,
        domains: dict[str, DomainResult],
        *,
        untrained: dict[str, float],
        inference: dict[str, Any],
        limit: int | None,
        weights: Mapping[str, Any] | None = None,
        precision: str = "float32",
        pictures: Mapping[str, Sequence[Picture]] | None = None,
    ) -> Report:
        recipe = run.recipe
        unseen = [d.miou for d in domains.values() if not d.seen]
        seen = [d.miou for d in domains.values() if d.seen]
        average = float(np.mean(unseen)) if unseen else None
        counts = {d.images for d in domains.values()}
        protocol = {
            "source": run.source_names,
            "steps": step,
            "batch": run.batch,
            "seed": run.seed,
            "window": list(model.spec.image_size),
            "inference": inference,
            "classes": SCORED[recipe.scored],
            "images per domain": counts.pop() if len(counts) == 1 else "see domains",
            "limited to the first images": limit,
            "checkpoint": checkpoint_of(recipe, step, weights or {}),
            "precision": precision,
            "mfuser": __version__,
        }
        if recipe.validate_every is not None:
            held_out = f"held-out images of {' and '.join(s.name for s in run.sources)}"
            protocol["validated on"] = recipe.validate_on or held_out
        if weights and weights.get("target"):
            protocol["chosen on"] = weights["target"]
        report = Report(
            pairing=run.pairing_name,
            recipe=run.recipe_name,
            protocol=protocol,
            notes=[*_notes(model, domains), *([recipe.note] if recipe.note else [])],
            classes=list(model.classes),
            domains=domains,
            untrained=untrained,
            average=average,
            gap=float(np.mean(seen)) - average if seen and average is not None else None,
        )
        report._pictures = dict(pictures or {})
        return report

    @staticmethod
    def read(path: Path) -> Report:
        """A report as `save` wrote it; its pictures are not in it. Raises CheckpointError."""
        try:
            return Report.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({brief(error)}); make it again with mfuser evaluate"
            ) from error

    def rows(self) -> list[tuple[str, list[float | None]]]:
        """Class and summary rows, a value per domain in per cent, then the unseen average."""
        names = list(self.domains)
        result: list[tuple[str, list[float | None]]] = []
        for c in self.classes:
            values = [self.domains[n].iou.get(c) for n in names]
            if any(v is not None for v in values):
                result.append((c, self._averaged(values)))
        result.append(("mIoU", self._averaged([self.domains[n].miou for n in names])))
        constant = [self.domains[n].most_frequent for n in names]
        if any(v is not None for v in constant):
            result.append(("most frequent class", self._averaged(constant)))
        if self.untrained:
            result.append(("untrained model", self._averaged([self.untrained[n] for n in names])))
        return result

    def columns(self) -> list[str]:
        heads = [n + (" (source)" if d.seen else "") for n, d in self.domains.items()]
        return [*heads, "unseen average"]

    def _averaged(self, values: list[float | None]) -> list[float | None]:
        unseen = [
            v
            for v, d in zip(values, self.domains.values(), strict=True)
            if v is not None and not d.seen
        ]
        return [*values, float(np.mean(unseen)) if unseen else None]

    def table(self) -> Table:
        """IoU in per cent of each class and domain, mIoU below."""
        rows = [(name, *map(_percent, values)) for name, values in self.rows()]
        title = f"{self.pairing}{self._chosen()}, IoU in %"
        return Table(("", *self.columns()), rows, title=title, strong="mIoU")

    @property
    def title(self) -> str:
        """Says so where a target decided which weights were scored."""
        return f"{self.pairing}, recipe {self.recipe}{self._chosen()}"

    def _chosen(self) -> str:
        target = self.protocol.get("chosen on")
        return f", its weights chosen on target {target}" if target else ""

    def summary(self) -> list[str]:
        lines = [self._protocol_line(), *self.notes]
        if self.gap is not None:
            lines.append(
                f"Gap between source and unseen average: {100 * self.gap:.1f} points of mIoU."
            )
        return lines

    def markdown(self, pictures: Sequence[str] = ()) -> str:
        table = replace(self.table(), title="")
        return document(self.title, ["IoU in %.", table, *self.summary()], pictures)

    def csv(self) -> str:
        rows = (
            [name, *(None if v is None else f"{100 * v:.4f}" for v in values)]
            for name, values in self.rows()
        )
        return csv_text(["class", *self.columns()], rows)

    def save(self, folder: Path, pictures: Sequence[str] = ()) -> None:
        """report.json, report.md and report.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REPORT, self.as_json())
        write_text(folder / "report.md", self.markdown(pictures))
        write_text(folder / "report.csv", self.csv())

    def as_json(self) -> dict[str, Any]:
        """NaN, which JSON lacks, becomes null."""
        dumped: dict[str, Any] = _no_nan(self.model_dump(mode="json"))
        return dumped

    def _protocol_line(self) -> str:
        p = self.protocol
        images = p["images per domain"]
        if isinstance(images, str):
            images = ", ".join(f"{n} {d.images}" for n, d in self.domains.items())
        parts = [
            f"source {p['source']}",
            f"{p['steps']} steps of {p['batch']}",
            f"seed {p['seed']}",
            how_tested(p),
            f"images per domain: {images}",
            f"classes scored: {p['classes']} ({self._class_counts()})",
            f"checkpoint: {p['checkpoint']}",
        ]
        if p.get("precision", "float32") != "float32":
            parts.append(f"computed in {p['precision']}")
        if "validated on" in p:
            parts.append(f"validated on {p['validated on']} while it trained")
        return "Protocol: " + "; ".join(parts) + "."

    def _class_counts(self) -> str:
        """ "19 of 19", or domain by domain where they differ."""
        counts = {n: f"{len(d.scored)} of {len(self.classes)}" for n, d in self.domains.items()}
        if len(set(counts.values())) == 1:
            return next(iter(counts.values()))
        return ", ".join(f"{name} {count}" for name, count in counts.items())


def checkpoint_of(recipe: RecipeSpec, step: int, weights: Mapping[str, Any]) -> str:
    """Which weights were scored. weights: what `Checkpoint.meta` says of them."""
    which = "the last one" if step == recipe.steps else f"step {step}, unfinished"
    if weights.get("kind") == "averaged" and recipe.ema is not None:
        which += f", its weights averaged over the steps (decay {recipe.ema.decay:g})"
    if weights.get("kind") == "best":
        averaged = ", of averaged weights" if weights.get("averaged") else ""
        chosen = f"(mIoU {weights['miou']:.1%})"
        which = f"step {step}, the best on {weights['on']} {chosen}{averaged}"
    return which


def _notes(model: DGSSModel, domains: dict[str, DomainResult]) -> list[str]:
    notes = []
    scratch = [
        role
        for role, spec in model.spec.encoders().items()
        if getattr(spec, "weights", None) == "random" and not spec.freeze
    ]
    if scratch:
        notes.append(
            f"The {' and '.join(scratch)} started from random weights and trained with the rest: "
            "nothing here is pretrained, so these figures say nothing about foundation models."
        )
    left_out: dict[tuple[str, ...], list[str]] = {}
    unlabeled: dict[tuple[str, ...], list[str]] = {}
    for name, domain in domains.items():
        missing = tuple(c for c in model.classes if c not in domain.scored)
        left_out.setdefault(missing, []).append(name)
        unlabeled.setdefault(tuple(domain.unlabeled), []).append(name)
    notes += [
        f"{', '.join(names)}: neither scored nor predicted: {', '.join(missing)}."
        for missing, names in left_out.items()
        if missing
    ]
    notes += [
        f"{', '.join(names)}: scored but never labeled: {', '.join(classes)}. Each counts as 0 if "
        "it is predicted anywhere, else not at all."
        for classes, names in unlabeled.items()
        if classes
    ]
    skipped = [name for d in domains.values() for name in d.skipped]
    if skipped:
        notes.append(f"Unreadable and left out: {', '.join(skipped)}.")
    return notes


def how_tested(protocol: Mapping[str, Any]) -> str:
    """ "window 512x512; inference sliding (stride 341x341, window_batch 1)"."""
    window = f"window {_text(protocol['window'])}"
    if "inference" not in protocol:  # an earlier version's report
        return f"{window}, stride {_text(protocol['stride'])}"
    return f"{window}; inference {_text(protocol['inference'])}"


def _text(value: Any) -> str:
    """An option's value for people: a size as HxW, a component with its options in brackets."""
    if isinstance(value, dict):
        given = {k: v for k, v in value.items() if k != "name" and v is not None}
        options = ", ".join(f"{k} {_text(v)}" for k, v in given.items())
        return " ".join([str(value.get("name", "")), f"({options})" if options else ""]).strip()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        size = len(value) == 2 and all(isinstance(v, int) for v in value)
        return ("x" if size else "/").join(map(_text, value))
    return str(value)


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
