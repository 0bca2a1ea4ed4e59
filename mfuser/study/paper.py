"""The published figures, and whether they are comparable with ours."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry, load_registry, shipped
from mfuser.config.run import RunSpec, domains
from mfuser.config.study import AdapterStudySpec, PaperReference
from mfuser.errors import MFuserError, suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

INCIDENTAL = (
    *("seed", "workers", "save_every", "source", "sources", "targets"),
    *("on_bad_image", "tensorboard", "tracker", "baselines", "checkpointing", "note"),
    *("frozen_dtype", "prefetch", "shard"),
)
"""Keys of a recipe that do not affect results, or that are compared elsewhere."""


@functools.cache
def figures() -> dict[str, Any]:
    """paper.toml."""
    return tomllib.loads(Path(__file__).with_name("paper.toml").read_text("utf-8"))


@functools.cache
def _as_shipped() -> Registry:
    """The registry without any user's file on top."""
    return load_registry(shipped())


def source() -> str:
    return str(figures()["source"])


def row(reference: PaperReference, label: str) -> dict[str, Any] | None:
    """The paper's row of a variant; None if it has none. Raises MFuserError for one it lacks."""
    tables = figures()["table"]
    table = tables.get(str(reference.table))
    if table is None:
        raise MFuserError(
            f"paper.table = {reference.table}: no such table{suggest(str(reference.table), tables)}"
        )
    rows: dict[str, Any] = table["rows"]
    if reference.rows is None:
        return rows.get(label)
    wanted = reference.rows.get(label)
    if wanted is not None and wanted not in rows:
        raise MFuserError(
            f"paper.rows: table {reference.table} has no row '{wanted}'{suggest(wanted, rows)}"
        )
    return rows[wanted] if wanted is not None else None


def differences(registry: Registry, run: RunSpec, wanted: dict[str, Any]) -> list[str]:
    """The differences of a run's protocol and models from those of a row of the paper.

    Where weights come from is not compared (a local file is as good as the hub), except that
    "random" never counts as equal, and a row that only its weights identify names a part of theirs.
    """
    protocol = figures()["protocol"]
    try:
        name = wanted.get("pairing", protocol["pairing"])
        pairing = _as_shipped().pairing(name, wanted.get("change", {}))
    except MFuserError:
        return ["the paper's parts are not all installed"]
    ours = run.model_dump(mode="json")
    found = _compare("", ours["pairing"], pairing.model_dump(mode="json"))
    weights = str(getattr(run.pairing.vfm, "weights", ""))
    if wanted.get("weights", "") not in weights:
        found.append(f"vfm.weights is {weights!r}, the paper's are {wanted['weights']}'s")
    recipe = RecipeSpec.model_validate(protocol["recipe"]).model_dump(mode="json")
    batch = run.batch
    effective = {**ours["recipe"], "batch_size": batch, "accumulate": 1}
    for key in INCIDENTAL:
        effective.pop(key, None)
        recipe.pop(key, None)
    found += _compare("recipe", effective, recipe)
    if len(run.sources) > 1:
        found.append(f"the sources are {run.source_names}, not {protocol['source']} alone")
    for ours_domain, name in (
        *((s, protocol["source"]) for s in run.sources[:1]),
        *((t, t.name) for t in run.targets if t.name in protocol["columns"]),
    ):
        expected = domains(registry, name)[0]
        if ours_domain.name != name:
            found.append(f"the source is {ours_domain.name}, not {name}")
        else:
            written = (d.model_dump(mode="json")["spec"] for d in (ours_domain, expected))
            found += _compare(name, *written)
    return found


def miou(wanted: dict[str, Any], images: dict[str, int]) -> dict[str, float]:
    """A row's figures for the domains that were scored in full. images: number scored, by domain.

    "average" if these are exactly the paper's domains.
    """
    protocol = figures()["protocol"]
    values = dict(zip(protocol["columns"], wanted["miou"], strict=True))
    shown = {n: v for n, v in values.items() if images.get(n) == protocol["images"][n]}
    if set(shown) == set(values) == set(images) - {protocol["source"]}:
        shown["average"] = wanted["average"]
    return shown


def adapter_row(
    study: AdapterStudySpec, label: str, spec: Any, registry: Registry
) -> dict[str, Any] | None:
    """Parameters and FLOPs of table 3, where the sizes are its own and the options the defaults."""
    if study.paper is None:
        return None
    wanted = row(study.paper, label)
    table = figures()["table"][str(study.paper.table)]
    same_size = (
        study.width == table["width"]
        and list(study.grid) == table["grid"]
        and study.prefix == table["prefix"]
        and study.batch == table["batch"]
    )
    if wanted is None or not same_size:
        return None
    default = registry.component("fusion", spec.component(), "the paper's adapter")
    return wanted if spec == default else None


def _compare(path: str, ours: Any, paper: Any) -> list[str]:
    if isinstance(ours, dict) and isinstance(paper, dict):
        found = []
        for key in {**paper, **ours}:
            inner = f"{path}.{key}" if path else key
            if key in ("weights", "ids"):
                if ours.get(key) == "random":
                    found.append(f"{inner} is 'random'")
            else:
                found += _compare(inner, ours.get(key), paper.get(key))
        return found
    if isinstance(ours, list | tuple) and isinstance(paper, list | tuple):
        ours, paper = list(ours), list(paper)
    return [] if ours == paper else [f"{path} is {_short(ours)}, the paper's {_short(paper)}"]


def _short(value: Any) -> str:
    text = repr(value.get("name", value) if isinstance(value, dict) else value)
    return text if len(text) < 60 else text[:57] + "…"
