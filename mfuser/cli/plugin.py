"""Commands for plugin authors: plugin new, plugin check, plugin bench."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from mfuser.cli import Group, cli, emit
from mfuser.cli.options import data_options, json_option, out_option, set_option
from mfuser.plugins.scaffold import KINDS

FAILED = 1


@cli.group(cls=Group)
def plugin() -> None:
    """A plugin of your own: a package to start from, and its conformance tests."""


@plugin.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="Kind of the component.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of the package. Default: ./NAME.",
)
@json_option
def new(name: str, kind: str, out: Path | None, as_json: bool) -> None:
    """Write the package NAME: a component that works, its spec, a test, pyproject.toml, README."""
    from mfuser.plugins.scaffold import write

    folder = out or Path(name)
    written = write(name, kind, folder)
    if as_json:
        emit({"folder": str(folder), "kind": kind, "files": [str(p) for p in written]})
        return
    for path in written:
        click.echo(f"  {path}")
    click.echo(
        f"next:\n  pip install -e {folder}\n  pytest {folder}\n"
        f"  mfuser plugin check {name.replace('-', '_')}"
    )


@plugin.command()
@click.argument("module")
@click.option(
    "--pairings",
    type=click.IntRange(min=1),
    default=None,
    help="At most so many pairings of each component, spread over the partners. Default: all.",
)
@data_options
@json_option
def check(module: str, pairings: int | None, data_roots: tuple[str, ...], as_json: bool) -> None:
    """Run the conformance suite on every component of MODULE.

    MODULE is a module that can be imported, a .py file, or an installed plugin's name. Nothing is
    downloaded: components are built at the options that their specs declare as `tiny`. Exit code 1
    if a check fails.
    """
    from mfuser.config.roots import DataRoots
    from mfuser.testing import check_component, plugin_components

    # A module in the working directory can be checked before it is installed.
    sys.path.insert(0, str(Path.cwd()))
    start = time.perf_counter()
    components, offered = plugin_components(module)
    reports, roots = [], DataRoots(data_roots)
    for component in offered:
        root = roots.given(component.name) if component.kind == "dataset" else None
        report = check_component(
            component.spec, root=root, components=components, pairings=pairings
        )
        reports.append(report)
        if not as_json:
            click.echo(str(report))
    seconds = time.perf_counter() - start
    faults = [f"{r.name}: {found[0].check}" for r in reports for found in r.faults]
    passed = all(r.passed for r in reports)
    if as_json:
        emit(
            {
                "plugin": module,
                "passed": passed,
                "seconds": round(seconds, 2),
                "components": [r.as_json() for r in reports],
            }
        )
    else:
        tried = sum(v.outcome != "skipped" for r in reports for v in r.verdicts)
        failed = sum(len(r.failed) for r in reports)
        skipped = sum(v.outcome == "skipped" for r in reports for v in r.verdicts)
        verdict = "all passed"
        if faults:
            count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
            verdict = f"{failed} failed by {count} ({', '.join(faults)})"
        left = f", {skipped} not tried" if skipped else ""
        click.echo(f"{module}: {tried} checks in {seconds:.0f} s, {verdict}{left}")
    if not passed:
        raise click.exceptions.Exit(FAILED)


@plugin.command()
@click.argument("module")
@click.option("--component", default=None, metavar="NAME", help="Which, where MODULE offers more.")
@set_option
@click.option("--seeds", default=None, metavar="0,1,…", help="Default: those of the study.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Of every run.")
@out_option("Default: bench/COMPONENT.")
@click.option("--dry-run", is_flag=True, help="List the runs and how they stand; run nothing.")
@json_option
def bench(
    module: str,
    component: str | None,
    settings: tuple[str, ...],
    seeds: str | None,
    steps: int | None,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure a fusion, enhancer, decoder or tuning part of MODULE against the built-in ones, on
    frozen towers in miniature: table, plot, and a verdict with its spread.

    MODULE as for `plugin check`; --set gives the part its options. The study is the registry's
    table [study.bench_KIND], with the part as one more value; what is finished is not run again.
    OUT/bench.json is what docs/leaderboard.md is made of.
    """
    from mfuser.study.bench import offered, prepared, record

    sys.path.insert(0, str(Path.cwd()))
    chosen = offered(module, component)
    folder = out or Path("bench") / chosen.name
    plan = prepared(module, chosen, settings, seeds, steps)
    from mfuser.cli.ablate import work
    from mfuser.study.plans import TrainingPlan
    from mfuser.study.runs import Inputs

    inputs = Inputs(plugins=plan.plugins)
    study = TrainingPlan(plan.registry, plan.study, plan.spec, folder, inputs)
    results = work(study, plan.study, 0, 1, dry_run, as_json, quiet=True)
    if results is None:
        return
    told = record(results, plan, folder)
    if as_json:
        emit(told.model_dump(mode="json"))
        return
    click.echo(f"for the leaderboard: {folder / 'bench.json'}")
