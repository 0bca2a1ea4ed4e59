"""A stranger's part against the built-in ones: the study it is measured in, and the record of it.

python -m mfuser.study.bench docs/leaderboard > docs/leaderboard.md makes the page of all records.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfuser.config.registry import Registry, load_registry
from mfuser.config.study import StudySpec
from mfuser.config.tables import parse_settings
from mfuser.errors import MFuserError, PluginError, suggest
from mfuser.files import write_json
from mfuser.plugins.components import Component
from mfuser.plugins.discovery import load_components, offered_by
from mfuser.specs import DecoderSpec, Options
from mfuser.study.paired import Comparison
from mfuser.study.report import AVERAGE, Results
from mfuser.version import __version__

KINDS = ("fusion", "enhancer", "decoder", "tuning")
RECORD = "bench.json"


@dataclass(frozen=True)
class Plan:
    """The study to run. plugins: what every run must load, where the part is not installed."""

    module: str
    component: Component
    registry: Registry
    study: str
    spec: StudySpec
    label: str
    plugins: tuple[str, ...]


class Standing(Options):
    """A row of the record: mIoU on unseen domains in per cent, over the seeds."""

    label: str
    trained: int | None
    seeds: int
    mean: float
    std: float | None


class Record(Options):
    """The result of a component, in one file that a pull request can add to docs/leaderboard."""

    plugin: str
    component: str
    kind: str
    options: dict[str, Any]
    mfuser: str
    protocol: dict[str, Any]
    standings: list[Standing]
    verdict: list[Comparison]


def offered(module: str, name: str | None) -> Component:
    """The part of a plugin that is measured.

    Raises PluginError if the plugin has none of a kind that is measured, or several to choose from.
    """
    found = [c for c in load_components() if c.plugin == module]
    if not found:
        components = load_components([module])
        own = offered_by(module)
        found = [c for c in components if c.spec in own]
    parts = {c.name: c for c in found if c.kind in KINDS}
    if not parts:
        raise PluginError(
            f"plugin '{module}' offers no part of a kind that is measured ({', '.join(KINDS)})"
        )
    if name is None and len(parts) > 1:
        raise PluginError(
            f"plugin '{module}' offers {', '.join(sorted(parts))}: say which with --component"
        )
    chosen = name or next(iter(parts))
    if chosen not in parts:
        raise PluginError(f"plugin '{module}' offers no '{chosen}'{suggest(chosen, parts)}")
    return parts[chosen]


def prepared(
    module: str,
    component: Component,
    settings: Iterable[str] = (),
    seeds: str | None = None,
    steps: int | None = None,
) -> Plan:
    """The study of the part's kind with the part as one more value of its axis.

    Raises RegistryError for a part that the pairing cannot hold, before anything runs.
    """
    installed = {c.plugin for c in load_components()}
    plugins = () if component.plugin in installed else (module,)
    registry = load_registry(plugins=plugins)
    kind, study = component.kind, f"bench_{component.kind}"
    options = parse_settings(tuple(settings))
    label = f"{component.name} (yours)"
    ours = registry.study(study, {})
    assert isinstance(ours, StudySpec)
    part = {"name": component.name, **options}
    theirs: dict[str, Any] = {"label": label, "set": {kind: part}}
    if kind == "decoder":
        decoder = registry.component(kind, part, "--set")
        assert isinstance(decoder, DecoderSpec)
        if decoder.joins():  # it takes no enhancer, which would read what comes after the blocks
            theirs["set"]["enhancer"] = "none"
    changes: dict[str, Any] = {"axes": {kind: [*ours.axes[kind], theirs]}, "reference": label}
    if seeds is not None:
        changes["seeds"] = [_whole(part) for part in seeds.split(",")]
    if steps is not None:
        warmup = min(30, steps // 4)
        changes["recipe_settings"] = {**ours.recipe_settings, "steps": steps, "warmup": warmup}
    spec = registry.study(study, changes)
    assert isinstance(spec, StudySpec)
    return Plan(module, component, registry, study, spec, label, plugins)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise MFuserError(f"--seeds: '{text}' is not a whole number; write 0,1,2") from None


def record(results: Results, plan: Plan, folder: Path) -> Record:
    """The record, also as bench.json in `folder`."""
    standings = []
    for row in results.rows:
        score = row.scores.get(AVERAGE)
        if score is None or score.mean is None:
            continue
        std = None if score.std is None else 100 * score.std
        standings.append(
            Standing(
                label=row.label, trained=row.trained, seeds=len(score.values),
                mean=100 * score.mean, std=std,
            )
        )  # fmt: skip
    axis = plan.spec.axes[plan.component.kind][-1]
    options = {k: v for k, v in axis["set"][plan.component.kind].items() if k != "name"}
    told = Record(
        plugin=plan.component.plugin,
        component=plan.component.name,
        kind=plan.component.kind,
        options=options,
        mfuser=__version__,
        protocol=results.protocol,
        standings=standings,
        verdict=results.comparisons,
    )
    write_json(folder / RECORD, told.model_dump(mode="json"))
    return told


def leaderboard(folder: Path) -> str:
    """A page of all records in a folder, a table per kind, best first.

    Raises MFuserError for a file that is not a record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(Record.model_validate_json(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise MFuserError(
                f"{path} is not a record of `mfuser plugin bench`: {error}"
            ) from error
    lines = [
        "# Leaderboard", "",
        "Parts measured by `mfuser plugin bench MODULE` on frozen towers in miniature: mIoU in %,",
        "mean ± standard deviation over seeds, averaged over the unseen domains of the miniature",
        "world. Add yours: run the command, put its `bench.json` into `docs/leaderboard/` as",
        "`PART.json`, run `python -m mfuser.study.bench docs/leaderboard > docs/leaderboard.md`.",
    ]  # fmt: skip
    for kind in KINDS:
        rows = [_row(r, s) for r in records if r.kind == kind for s in r.standings]
        if rows:
            lines += ["", f"## {kind}", "", "| part | measured with | unseen | seeds | trained |"]
            lines += ["|---|---|--:|--:|--:|", *(text for _, text in sorted(rows, reverse=True))]
    if not records:
        lines += ["", "No part has been measured yet."]
    return "\n".join(lines) + "\n"


def _row(record: Record, standing: Standing) -> tuple[float, str]:
    spread = f" ± {standing.std:.1f}" if standing.std is not None else ""
    trained = f"{standing.trained / 1e6:.2f} M" if standing.trained is not None else ""
    name = standing.label.removesuffix(" (yours)")
    cells = [name, record.component, f"{standing.mean:.1f}{spread}", str(standing.seeds), trained]
    return standing.mean, "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(leaderboard(Path(sys.argv[1])))
