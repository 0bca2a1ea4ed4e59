"""From a study to its variants: every combination of axis values, resolved and validated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mfuser.config.pairing import PairingSpec
from mfuser.config.registry import Registry
from mfuser.config.run import Domain, RunSpec
from mfuser.config.study import StudySpec, is_alternative
from mfuser.config.tables import Table, merge
from mfuser.errors import MFuserError, RegistryError, suggest
from mfuser.model.assembly import sketch
from mfuser.study import paper


@dataclass(frozen=True)
class Choice:
    """One value of one axis. settings, recipe: tables laid over the base; pairing, recipe_name:
    another base."""

    axis: str
    label: str
    settings: Table
    recipe: Table
    pairing: str | None = None
    recipe_name: str | None = None


@dataclass(frozen=True)
class Variant:
    """One point of the grid. slug: its folder. runs: seed -> the run."""

    label: str
    slug: str
    choices: dict[str, str]
    pairing: PairingSpec
    runs: dict[int, RunSpec]
    trained: int | None
    """Parameters that training changes; None if the model cannot be laid out without weights."""

    def identity(self) -> dict[str, Any]:
        """Settings on which a results folder must agree to hold this variant."""
        run = next(iter(self.runs.values()))
        table = run.model_dump(mode="json", include={"pairing", "recipe", "sources", "targets"})
        table["recipe"].pop("seed")
        return table


def variants(registry: Registry, name: str, study: StudySpec) -> list[Variant]:
    """The whole grid, each variant's pairing and recipe validated and its model laid out.

    Raises RegistryError naming the axis values that a component refuses.
    """
    found: list[Variant] = []
    axes = [[_choice(axis, v) for v in values] for axis, values in study.axes.items()]
    for choices in itertools.product(*axes):
        variant = _variant(registry, name, study, choices)
        for other in found:
            if other.slug == variant.slug:
                raise RegistryError(
                    f"{_place(registry, name)}: two variants are called '{other.label}'"
                    + (f" and '{variant.label}'" if other.label != variant.label else "")
                    + ": give one a label of its own, {label = …, set = {…}}"
                )
        _check_paper(registry, name, study, variant.label)
        found.append(variant)
    labels = [v.label for v in found]
    if study.reference is not None and study.reference not in labels:
        raise RegistryError(
            f"{_place(registry, name)}: reference '{study.reference}' is not a variant of this "
            f"study{suggest(study.reference, labels)}"
        )
    return found


def _check_paper(registry: Registry, name: str, study: StudySpec, label: str) -> None:
    try:
        if study.paper is not None:
            paper.row(study.paper, label)
    except MFuserError as error:
        raise RegistryError(f"{_place(registry, name)}: {error}") from error


def check_data(registry: Registry, found: Sequence[Variant]) -> None:
    """Raises DataError where a source or target is missing or incomplete."""
    checked: list[tuple[Domain, str]] = []
    for variant in found:
        run = next(iter(variant.runs.values()))
        for domain, split in (
            *((s, "train") for s in run.sources),
            *((t, "val") for t in run.targets),
        ):
            if (domain, split) not in checked:
                domain.build(registry, split)
                checked.append((domain, split))


def _choice(axis: str, value: Any) -> Choice:
    if is_alternative(value):
        return Choice(
            axis,
            value["label"],
            value.get("set", {}),
            value.get("recipe", {}),
            value.get("pairing"),
        )
    label = value_label(axis, value)
    if axis == "pairing":
        return Choice(axis, label, {}, {}, pairing=_name(axis, value))
    if axis == "recipe":
        return Choice(axis, label, {}, {}, recipe_name=_name(axis, value))
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k != "label"}
    table: Any = value
    for part in reversed(axis.split(".")):
        table = {part: table}
    if axis.startswith("recipe."):
        return Choice(axis, label, {}, table["recipe"])
    return Choice(axis, label, table, {})


def _name(axis: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RegistryError(f"axis '{axis}' takes names, not {value!r}")
    return value


def value_label(axis: str, value: Any) -> str:
    """The name of a value in tables: components by name, numbers with their key."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if "label" in value:
            return str(value["label"])
        rest = [f"{k}={_plain(v)}" for k, v in value.items() if k != "name"]
        return " ".join([str(value["name"]), *rest] if "name" in value else rest)
    return f"{axis.rpartition('.')[2]}={_plain(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ("x" if len(value) == 2 else ",").join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _variant(
    registry: Registry, name: str, study: StudySpec, choices: tuple[Choice, ...]
) -> Variant:
    base, recipe_name = study.base, study.recipe
    settings: Table = dict(study.settings)
    recipe: Table = dict(study.recipe_settings)
    for choice in choices:
        base, recipe_name = choice.pairing or base, choice.recipe_name or recipe_name
        settings = merge(settings, choice.settings)
        recipe = merge(recipe, choice.recipe)
    label = ", ".join(c.label for c in choices)
    shown = ", ".join(
        f"{c.axis} = {c.label.removeprefix(c.axis.rpartition('.')[2] + '=')}" for c in choices
    )
    runs: dict[int, RunSpec] = {}
    try:
        pairing = registry.pairing(base, settings, by="")
        for seed in study.seeds:
            runs[seed] = RunSpec.of(
                registry,
                f"{name}: {label}",
                recipe_name,
                pairing=pairing,
                recipe=registry.recipe(recipe_name, merge(recipe, {"seed": seed}), by=""),
                source=study.source,
                targets=study.targets,
            )
        trained = _trained(pairing)
    except MFuserError as error:
        raise RegistryError(f"{_place(registry, name)}, {shown}: {error}") from error
    if not next(iter(runs.values())).targets:
        raise RegistryError(
            f"{_place(registry, name)}: neither the study nor recipe '{recipe_name}' names targets"
        )
    slug = re.sub(r"[^A-Za-z0-9._=+-]+", "-", label).strip("-.") or "variant"
    return Variant(label, slug, {c.axis: c.label for c in choices}, pairing, runs, trained)


def _place(registry: Registry, name: str) -> str:
    return registry.place("study", name, "axes")


def _trained(pairing: PairingSpec) -> int | None:
    """Lays the model out: parts refuse here what validating their options cannot show."""
    try:
        model = sketch(pairing)
    except MFuserError:
        raise
    except Exception:
        # A plugin's part that computes with values while it is built; training will show.
        return None
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
