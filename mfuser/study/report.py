"""The results of a study: a row per variant, mean ± standard deviation over its seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mfuser.config.registry import Registry
from mfuser.config.study import StudySpec
from mfuser.reporting.report import how_tested
from mfuser.reporting.tables import Table, csv_text, document
from mfuser.specs import Options
from mfuser.study import paired, paper, reuse
from mfuser.study.grid import Variant
from mfuser.study.paired import Comparison, Images
from mfuser.study.runs import REPORT, Job

AVERAGE = "unseen average"


class Score(Options):
    """mIoU in [0, 1] of each seed that has one. std: of the sample; None for one seed."""

    values: dict[int, float]
    mean: float | None
    std: float | None

    @staticmethod
    def of(values: dict[int, float]) -> Score:
        numbers = list(values.values())
        return Score(
            values=values,
            mean=statistics.fmean(numbers) if numbers else None,
            std=statistics.stdev(numbers) if len(numbers) > 1 else None,
        )

    def text(self) -> str:
        if self.mean is None:
            return ""
        spread = f" ± {100 * self.std:.1f}" if self.std is not None else ""
        return f"{100 * self.mean:.1f}{spread}"


class Row(Options):
    """A variant. states: by seed; finished, diverged, failed, interrupted, begun or open.
    paper: the published mIoU in percent, where protocol and models are the same. taken: by seed,
    the run of another study that it is, STUDY/VARIANT/seed0."""

    label: str
    choices: dict[str, str]
    trained: int | None
    states: dict[int, str]
    messages: dict[int, str]
    scores: dict[str, Score]
    paper: dict[str, float]
    taken: dict[int, str] = {}

    def state(self) -> str:
        """The number of seeds behind the figures, and the state of the others."""
        done = sum(s == "finished" for s in self.states.values())
        rest = [s for s in self.states.values() if s != "finished"]
        counts = [f"{rest.count(s)} {s}" for s in dict.fromkeys(rest)]
        return ", ".join([f"{done} of {len(self.states)}", *counts])


class Results(Options):
    """All results of a study. domains: the unseen ones in order, then the source.

    comparisons: of the study's reference with each other variant, the best of these first.
    """

    study: str
    base: str
    protocol: dict[str, Any]
    notes: list[str]
    domains: list[str]
    seen: list[str]
    rows: list[Row]
    comparisons: list[Comparison] = []

    @property
    def columns(self) -> list[str]:
        return [*self.domains, AVERAGE]

    @property
    def with_paper(self) -> bool:
        return any(row.paper for row in self.rows)

    def tables(self) -> list[Table]:
        """mIoU in per cent of each variant and domain."""
        title = f"Study {self.study}, mIoU in %"
        return [Table(self._heads(), self._cells(), title=title, left=2)]

    def summary(self) -> list[str]:
        lines = [self._protocol_line()] if self.protocol else []
        for row in self.rows:
            for seed, message in row.messages.items():
                lines.append(f"{row.label}, seed {seed} {row.states[seed]}: {message}")
        shared = [
            f"{row.label} ({', '.join(row.taken.values())})" for row in self.rows if row.taken
        ]
        if shared:
            lines.append(f"The same runs as in another study, trained once: {'; '.join(shared)}.")
        if self.with_paper:
            lines.append(f"Paper: {paper.source()}, one run each.")
        return [*lines, *self.notes, *(c.text() + "." for c in self.comparisons)]

    def markdown(self, pictures: Sequence[str] = ()) -> str:
        about = f"Base: {self.base}. mIoU in %, mean ± standard deviation over seeds."
        tables = [replace(table, title="") for table in self.tables()]
        return document(f"Study {self.study}", [about, *tables, *self.summary()], pictures)

    def csv(self) -> str:
        """A line per variant and domain, in percent."""
        seeds = list(self.rows[0].states)
        heads = ["variant", *self.rows[0].choices, "domain", "seeds", "mean", "std"]
        heads += [f"seed {s}" for s in seeds] + (["paper"] if self.with_paper else [])
        return csv_text(heads, (self._line(r, d, seeds) for r in self.rows for d in self.columns))

    def against(self, reference: str | None, images: Mapping[str, Images]) -> list[Comparison]:
        """One variant (None: the best) against every other, best rival first.

        images: of each variant, on unseen domains.
        """
        rows = [r for r in self.rows if r.scores.get(AVERAGE, Score.of({})).values]
        rows.sort(key=lambda r: -(r.scores[AVERAGE].mean or 0.0))
        first = next((r for r in rows if reference is None or r.label == reference), None)
        if first is None:
            return []
        unseen = [d for d in self.domains if d not in self.seen]
        found = []
        for second in rows:
            if second is first:
                continue
            both = [r.scores for r in (first, second)]
            pairs = [
                (both[0][d].values, both[1][d].values)
                for d in unseen
                if d in both[0] and d in both[1]
            ]
            found.append(
                paired.compare(
                    first.label,
                    second.label,
                    pairs,
                    (both[0][AVERAGE].values, both[1][AVERAGE].values),
                    (images.get(first.label, {}), images.get(second.label, {})),
                )
            )
        return [c for c in found if c is not None]

    def _line(self, row: Row, domain: str, seeds: Sequence[int]) -> list[str | None]:
        score = row.scores.get(domain, Score.of({}))
        values = [score.mean, score.std, *(score.values.get(s) for s in seeds)]
        line: list[str | None] = [row.label, *row.choices.values(), domain, str(len(score.values))]
        line += [None if v is None else f"{100 * v:.4f}" for v in values]
        return [*line, _two(row.paper.get(domain))] if self.with_paper else line

    def _heads(self) -> list[str]:
        heads = ["variant", "seeds", "trained"]
        for domain in self.columns:
            heads.append(domain + (" (source)" if domain in self.seen else ""))
            if any(domain in row.paper for row in self.rows):
                heads.append("paper")
        return heads

    def _cells(self) -> list[list[str]]:
        lines = []
        for row in self.rows:
            trained = "" if row.trained is None else f"{row.trained / 1e6:.2f} M"
            cells = [row.label, row.state(), trained]
            for domain in self.columns:
                score = row.scores.get(domain)
                cells.append(score.text() if score else "")
                if any(domain in other.paper for other in self.rows):
                    cells.append(_two(row.paper.get(domain)))
            lines.append(cells)
        return lines

    def _protocol_line(self) -> str:
        p = self.protocol
        return (
            f"Protocol: source {p['source']}; {p['steps']} steps of {p['batch']}; "
            f"{how_tested(p)}; images per domain: {p['images per domain']}; classes scored: "
            f"{p.get('classes', 'not stated')}; checkpoint: {p['checkpoint']}."
        )


def collect(
    registry: Registry,
    name: str,
    study: StudySpec,
    variants: Sequence[Variant],
    jobs: Sequence[Job],
) -> Results:
    """The results of the finished runs, and the state of the others."""
    by_label = {job.label: job for job in jobs}
    rows: list[Row] = []
    notes: list[str] = []
    domains: dict[str, bool] = {}
    protocols: list[dict[str, Any]] = []
    withheld: dict[str, str] = {}
    by_image: dict[str, dict[tuple[str, str], dict[int, float]]] = {}
    for variant in variants:
        values: dict[str, dict[int, float]] = {}
        states: dict[int, str] = {}
        messages: dict[int, str] = {}
        images: dict[str, int] = {}
        taken: dict[int, str] = {}
        for seed in variant.runs:
            job = by_label[f"{variant.label}, seed {seed}"]
            states[seed], message = job.state()
            if message and states[seed] != "finished":
                messages[seed] = message
            if states[seed] != "finished":
                continue
            if source := reuse.taken_from(job.folder):
                taken[seed] = source
            report = json.loads((job.folder / REPORT).read_text("utf-8"))
            protocols.append(report["protocol"])
            notes += [n for n in report["notes"] if n not in notes]
            for domain, result in report["domains"].items():
                domains[domain] = result["seen"]
                images[domain] = result["images"]
                for image in () if result["seen"] else result.get("per_image", ()):
                    of_variant = by_image.setdefault(variant.label, {})
                    of_variant.setdefault((domain, image["name"]), {})[seed] = image["miou"]
                if result["miou"] is not None:
                    values.setdefault(domain, {})[seed] = result["miou"]
            if report["average"] is not None:
                values.setdefault(AVERAGE, {})[seed] = report["average"]
        wanted = paper.row(study.paper, variant.label) if study.paper else None
        published: dict[str, float] = {}
        if wanted is not None:
            run = next(iter(variant.runs.values()))
            different = paper.differences(registry, run, wanted)
            if different:
                more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
                withheld[variant.label] = different[0] + more
            elif images:
                published = paper.miou(wanted, images)
        rows.append(
            Row(
                label=variant.label,
                choices=variant.choices,
                trained=variant.trained,
                states=states,
                messages=messages,
                scores={d: Score.of(v) for d, v in values.items()},
                paper=published,
                taken=taken,
            )
        )
    for reason in dict.fromkeys(withheld.values()):
        labels = [label for label, r in withheld.items() if r == reason]
        beside = "any variant" if len(labels) == len(variants) else ", ".join(labels)
        notes.append(f"The paper's figures are not comparable with {beside}: {reason}.")
    results = Results(
        study=name,
        base=study.base,
        protocol=_common(protocols),
        notes=notes,
        domains=[d for d, seen in domains.items() if not seen] + [d for d in domains if domains[d]],
        seen=[d for d in domains if domains[d]],
        rows=rows,
    )
    return results.model_copy(update={"comparisons": results.against(study.reference, by_image)})


def _common(protocols: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all runs share; "varied" where they differ."""
    if not protocols:
        return {}
    first = {k: v for k, v in protocols[0].items() if k != "seed"}
    for key in first:
        if any(p.get(key) != first[key] for p in protocols):
            first[key] = ["varied", "varied"] if isinstance(first[key], list) else "varied"
    return first


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
