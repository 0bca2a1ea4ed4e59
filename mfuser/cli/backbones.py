"""`mfuser list backbones --all`: every model that the installed plugins can build."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict
from typing import Any

import click

from mfuser.cli import emit
from mfuser.config.registry import Registry
from mfuser.reporting.tables import Table
from mfuser.specs import BackboneInfo, BackboneSpec

COLUMNS = ("width", "depth", "patch", "tokens")


def show_all(registry: Registry, pattern: str | None, as_json: bool) -> None:
    found = models(registry, pattern)
    if as_json:
        emit(found)
        return
    if not found:
        click.echo(f"no model's name matches '{pattern}'")
        return
    heads = ("component", "model", *COLUMNS, "tried", "license")
    for line in Table(heads, [_row(e) for e in found], left=2, tail=2).lines():
        click.echo(line)
    usable = sum(not e["refused"] for e in found)
    click.echo(f"{usable} models, {len(found) - usable} refused; tokens of a 448x448 image")


def _row(entry: dict[str, Any]) -> list[str]:
    row = [entry["component"], entry["name"]]
    if entry["refused"]:
        return [*row, *("" for _ in COLUMNS), "no", f"refused: {entry['refused']}"]
    numbers = ["?" if entry[column] is None else str(entry[column]) for column in COLUMNS]
    return [*row, *numbers, "yes" if entry["tried"] else "no", entry["license"] or "?"]


def models(registry: Registry, pattern: str | None) -> list[dict[str, Any]]:
    """Component and facts of each model whose name holds, or matches, the pattern."""
    listed: list[dict[str, Any]] = []
    for kind in ("vision", "vision_language"):
        for component in registry.components.kind(kind).values():
            spec = component.spec
            assert issubclass(spec, BackboneSpec)
            listed += [
                {"component": component.name, "kind": kind, **asdict(info)}
                for info in spec.catalog()
                if _matches(info, pattern)
            ]
    return listed


def _matches(info: BackboneInfo, pattern: str | None) -> bool:
    if pattern is None:
        return True
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(info.name.lower(), pattern.lower())
    return pattern.lower() in info.name.lower()
