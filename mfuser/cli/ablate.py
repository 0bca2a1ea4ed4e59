"""The command that runs a study."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfuser.cli import INTERRUPTED, cli, emit
from mfuser.cli.options import (
    Common,
    common_options,
    out_option,
    recipe_option,
    set_option,
    set_recipe_option,
    source_option,
    targets_option,
)

if TYPE_CHECKING:
    from mfuser.config.registry import Registry
    from mfuser.config.study import AdapterStudySpec, StudySpec
    from mfuser.engine.console import Console
    from mfuser.study.runs import Inputs, Job, Trouble


OPTIONS = {
    **{key: f"--{key}" for key in ("base", "recipe", "source", "targets", "seeds")},
    **{"settings": "--set", "recipe_settings": "--set-recipe", "axes": "--axis"},
}
"""Key of a study -> the option that sets it."""


@cli.command()
@click.argument("study")
@out_option("Folder of runs and results. Default: studies/STUDY.")
@click.option(
    "--axis",
    "axes",
    multiple=True,
    metavar="NAME=A,B,…",
    help="Replace the values of an axis, e.g. fusion=mvfuser,none.",
)
@click.option("--base", default=None, metavar="PAIRING", help="The pairing to vary.")
@recipe_option("The recipe that every variant is trained with.")
@source_option("The dataset that every variant is trained on.")
@targets_option("Domains that every variant is tested on.")
@click.option(
    "--seeds",
    default=None,
    metavar="0,1,…",
    help="Train each variant once with each of these seeds.",
)
@set_option
@set_recipe_option
@click.option("--index", type=int, default=0, help="Take this share of the runs, counted from 0.")
@click.option("--of", type=click.IntRange(min=1), default=1, help="The number of shares.")
@click.option(
    "--launcher",
    type=click.Choice(["local", "submitit", "ray"]),
    default="local",
    show_default=True,
    help="Who runs the runs: this process one by one, SLURM, or a Ray cluster.",
)
@click.option(
    "--launcher-set",
    "launcher_settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the launcher, e.g. timeout_min=600 or gpus=1.",
)
@click.option("--dry-run", is_flag=True, help="List the runs and their state; run nothing.")
@common_options(data=True, device=True)
def ablate(
    study: str,
    out: Path | None,
    index: int,
    of: int,
    launcher: str,
    launcher_settings: tuple[str, ...],
    dry_run: bool,
    common: Common,
    **changes: Any,
) -> None:
    """Run STUDY, a [study.STUDY] table of the registry: train each variant with each seed,
    evaluate it, and write one table of the results.

    Nothing runs before the whole grid is validated. Finished runs are skipped, so the same command
    continues after Ctrl-C. A run that fails does not stop the others. Several processes or
    machines can share the work (--index, --of), each on one GPU (CUDA_VISIBLE_DEVICES); or
    --launcher hands every run to SLURM or Ray and watches them (docs/studies.md).
    """
    registry = common.registry()
    spec = registry.study(study, _overrides(changes), by=OPTIONS)
    if not dry_run:
        common.check_device()
    from mfuser.config.study import AdapterStudySpec, StudySpec
    from mfuser.engine.processes import check_alone
    from mfuser.study.runs import Inputs

    check_alone("ablate")
    folder = out or Path("studies") / study
    inputs = Inputs(common.registries, common.plugins, common.data_roots, common.device)
    plan: _Plan
    if isinstance(spec, AdapterStudySpec):
        plan = _AdapterPlan(registry, study, spec, folder, inputs)
    else:
        assert isinstance(spec, StudySpec)
        plan = _TrainingPlan(registry, study, spec, folder, inputs)
    engine = Engine(launcher, launcher_settings)
    work(plan, study, folder, index, of, dry_run, common.as_json, engine=engine)


@dataclass(frozen=True)
class Engine:
    """Who runs a study's runs, and its options as they were given."""

    name: str = "local"
    settings: tuple[str, ...] = ()

    def run(self, jobs: list[Job], folder: Path, console: Console) -> list[Trouble]:
        """Those that did not finish. Raises StudyInterrupted after Ctrl-C."""
        from mfuser.study.runs import work_through

        if self.name == "local":
            return work_through(jobs, console)
        from mfuser.study.launchers import open_launcher
        from mfuser.study.spread import spread

        launcher = open_launcher(self.name, self._options(), folder)
        try:
            return spread(jobs, launcher, console)
        finally:
            launcher.close()

    def check(self, of: int) -> None:
        """Raises UsageError for options that do not go together."""
        if self.name == "local" and self.settings:
            raise click.UsageError("--launcher-set goes with --launcher submitit or ray")
        if self.name != "local" and of > 1:
            raise click.UsageError(
                f"--launcher {self.name} shares out the work itself: leave out --index and --of"
            )
        self._options()

    def _options(self) -> dict[str, Any]:
        from mfuser.config.tables import parse_settings

        return parse_settings(self.settings)


class _Plan:
    """A study's jobs, and the table of what they found."""

    jobs: list[Job]
    identities: dict[str, dict[str, Any]]

    def check(self) -> None:
        """Raises MFuserError for what matters only if something is to run."""

    def results(self) -> Any:
        raise NotImplementedError


class _TrainingPlan(_Plan):
    def __init__(
        self, registry: Registry, name: str, spec: StudySpec, folder: Path, inputs: Inputs
    ) -> None:
        from mfuser.study import grid, runs

        self.registry, self.name, self.spec, self.folder = registry, name, spec, folder
        self.variants = grid.variants(registry, name, spec)
        self.jobs = runs.training_jobs(self.variants, folder, inputs)
        self.identities = {v.slug: v.identity() for v in self.variants}

    def check(self) -> None:
        from mfuser.study import grid, runs

        runs.check_runs(self.registry, self.variants, self.folder)
        if any(job.state()[0] != "finished" for job in self.jobs):
            grid.check_data(self.registry, self.variants)

    def results(self) -> Any:
        from mfuser.study import report

        return report.collect(self.registry, self.name, self.spec, self.variants, self.jobs)


class _AdapterPlan(_Plan):
    def __init__(
        self, registry: Registry, name: str, spec: AdapterStudySpec, folder: Path, inputs: Inputs
    ) -> None:
        from mfuser.study import adapters

        self.registry, self.name, self.spec = registry, name, spec
        self.adapters = adapters.adapters(registry, name, spec)
        self.jobs = adapters.jobs(self.adapters, spec, folder, inputs)
        self.identities = adapters.identities(self.adapters, spec)

    def results(self) -> Any:
        from mfuser.study import adapters

        return adapters.collect(self.registry, self.name, self.spec, self.adapters, self.jobs)


def training_plan(
    registry: Registry, name: str, spec: StudySpec, folder: Path, inputs: Inputs
) -> _Plan:
    """The plan of a study that a command put together, for `work`."""
    return _TrainingPlan(registry, name, spec, folder, inputs)


def work(
    plan: _Plan,
    study: str,
    folder: Path,
    index: int,
    of: int,
    dry_run: bool,
    as_json: bool,
    quiet: bool = False,
    engine: Engine = Engine(),
) -> Any:
    """Run what is left of a study; its results are shown and returned (None after a dry run)."""
    engine.check(of)
    from mfuser.engine.console import Console
    from mfuser.reporting.tables import show
    from mfuser.study import runs
    from mfuser.study.results import save

    share = runs.share(plan.jobs, index, of)
    runs.check_study(folder, study, plan.identities)
    if dry_run:
        _list(share, folder, as_json)
        return None
    plan.check()
    runs.open_study(folder, study, plan.identities)
    console = Console()
    try:
        troubles = engine.run(share, folder, console)
    except runs.StudyInterrupted as stop:
        console.say(
            f"{stop}. What is finished stays; the same command goes on from here:\n"
            f"  mfuser {shlex.join(sys.argv[1:])}"
        )
        raise click.exceptions.Exit(INTERRUPTED) from stop
    results = plan.results()
    without_plot = save(results, folder)
    if without_plot:
        console.say(without_plot)
    if as_json and not quiet:
        emit(results.model_dump(mode="json"))
    elif not as_json:
        show(*results.tables(), *results.summary(), f"results: {folder / 'results.md'}")
    if troubles:
        console.say(f"{len(troubles)} of {len(share)} runs did not finish:")
        for job, status, message in troubles:
            console.say(f"  {job.label} {status}: {message}")
        raise click.exceptions.Exit(1)
    return results


def _list(jobs: list[Job], folder: Path, as_json: bool) -> None:
    if as_json:
        emit([{"run": j.label, "folder": str(j.folder), "state": j.state()[0]} for j in jobs])
        return
    from mfuser.reporting.tables import Table

    rows = [(job.label, job.state()[0], str(job.folder)) for job in jobs]
    click.echo("\n".join(Table(("run", "state", "folder"), rows, left=3).lines()))
    left = sum(job.state()[0] not in ("finished", "diverged") for job in jobs)
    click.echo(f"{len(jobs)} runs in {folder}, {left} to do")


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The changes that the given options make to the study's table."""
    from mfuser.config.tables import parse_settings

    named = ("base", "recipe", "source", "targets")
    changes: dict[str, Any] = {key: given[key] for key in named if given[key] is not None}
    if given["seeds"] is not None:
        changes["seeds"] = _list_of(given["seeds"])
    for key in ("settings", "recipe_settings"):
        if given[key]:
            changes[key] = parse_settings(given[key])
    for axis in given["axes"]:
        name, sep, values = axis.partition("=")
        if not sep or not name.strip() or not values.strip():
            raise click.UsageError(f"--axis {axis}: write NAME=A,B,…, e.g. fusion=mvfuser,none")
        changes.setdefault("axes", {})[name.strip()] = _list_of(values)
    return changes


def _list_of(text: str) -> list[Any]:
    """ "a,b" or "8,4" or a list in TOML -> its values."""
    from mfuser.config.tables import parse_settings

    if text.strip().startswith("["):
        value = parse_settings([f"value={text}"])["value"]
        return value if isinstance(value, list) else [value]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [parse_settings([f"value={part}"])["value"] for part in parts]
