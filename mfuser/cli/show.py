"""Commands that show what there is: list, describe, doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mfuser.cli import cli, emit
from mfuser.cli.options import (
    Common,
    common_options,
    json_option,
    set_option,
)
from mfuser.errors import suggest

if TYPE_CHECKING:
    from mfuser.plugins.components import Components

SLOW = 2.0
"""Seconds to load, from which a plugin is named by a plain `mfuser list` too."""


@cli.command("list")
@click.argument("kind", required=False)
@click.argument("pattern", required=False)
@click.option("--all", "everything", is_flag=True, help="With backbones: list every model.")
@common_options()
def list_(
    kind: str | None,
    pattern: str | None,
    everything: bool,
    common: Common,
) -> None:
    """List what is declared and installed: pairings, recipes, and the components of each kind.

    `list backbones` shows the backbone components, `list backbones --all [PATTERN]` the models
    they can build, PATTERN being part of a name or a wildcard pattern.
    """
    if (everything or pattern is not None) and not (everything and kind == "backbones"):
        raise click.UsageError("--all and PATTERN go together with 'backbones': list backbones "
                               "--all [PATTERN]")  # fmt: skip
    registry = common.registry()
    if everything:
        from mfuser.cli.backbones import show_all

        show_all(registry, pattern, common.as_json)
        return
    from mfuser.reporting.tables import Table
    from mfuser.specs import KINDS

    tables = {"pairings": "pairing", "recipes": "recipe", "datasets": "dataset", "studies": "study"}
    # "datasets" is both: components and named tables.
    known = [*tables, *KINDS, "backbones", "plugins"]
    if kind is not None and kind not in known:
        raise click.UsageError(f"nothing of the kind '{kind}' is listed{suggest(kind, known)}")
    shown: dict[str, Any] = {}
    for plural, table in tables.items():
        shown[plural] = [
            {"name": name, "where": registry.where(table, name)} for name in registry.names(table)
        ]
    for component_kind in KINDS:
        shown[component_kind] = [
            {
                "name": c.name,
                "plugin": c.plugin,
                "help": (c.spec.__doc__ or "").strip().split("\n")[0],
            }
            for c in registry.components.kind(component_kind).values()
        ]
    shown["plugins"] = _plugins(registry.components, kind == "plugins")
    if kind == "backbones":
        shown = {k: shown[k] for k in ("vision", "vision_language")}
    elif kind is not None:
        shown = {kind: shown[kind]}
    if common.as_json:
        emit(shown)
        return
    for title, entries in shown.items():
        if title == "plugins" and not entries and kind is None:
            continue
        click.secho(title.replace("_", "-"), bold=True)
        rows = [_row(entry) for entry in entries]
        if not rows:
            rows = [("none",)]
        for line in Table([""] * len(rows[0]), rows, left=len(rows[0])).lines():
            click.echo(f"  {line}")


def _plugins(components: Components, everything: bool) -> list[dict[str, Any]]:
    """Plugins that failed, loaded slowly or changed state of the process; or every one."""
    entries: list[dict[str, Any]] = [
        {"name": p.plugin, "seconds": round(p.seconds, 3), "changed": list(p.changed)}
        for p in components.loaded
        if everything or p.changed or p.seconds > SLOW
    ]
    return entries + [{"name": b.plugin, "broken": b.cause} for b in components.broken]


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    """A name, and what there is to say of it."""
    if "broken" in entry:
        return entry["name"], f"failed to load: {entry['broken']}"
    if "seconds" in entry:
        changed = f"  changed {', '.join(entry['changed'])}; it was put back"
        return entry["name"], f"{entry['seconds']:6.2f} s{changed if entry['changed'] else ''}"
    if "plugin" in entry:
        return entry["name"], entry["help"], f"[{entry['plugin']}]"
    return entry["name"], entry["where"]


@cli.command()
@click.argument("pairing")
@set_option
@common_options()
def describe(
    pairing: str,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Describe the assembled model of PAIRING: parameters, FLOPs and token grids, part by part.

    Nothing is downloaded and no memory is allocated: the model is laid out without its weights.
    """
    registry = common.registry()
    spec = registry.pairing(pairing, settings)
    from mfuser.reporting.describe import describe as describe_model
    from mfuser.reporting.describe import render
    from mfuser.reporting.tables import show

    facts = describe_model(spec)
    if common.as_json:
        emit({"pairing": pairing, **facts})
    else:
        show(*render(pairing, facts))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, devices, plugins, and what each optional part needs."""
    from mfuser.cli.doctor import examine

    report = examine()
    if as_json:
        emit(report)
        return
    for title, entries in report.items():
        click.secho(title, bold=True)
        for name, value in entries.items():
            click.echo(f"  {name}: {value}")
