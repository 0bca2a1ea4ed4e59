"""The command that runs a study."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfuser.cli import cli, emit
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
from mfuser.engine.signals import exit_code

if TYPE_CHECKING:
    from mfuser.engine.console import Console
    from mfuser.study.plans import Plan
    from mfuser.study.runs import Job, Trouble


OPTIONS = {
    **{key: f"--{key}" for key in ("base", "recipe", "source", "targets", "seeds")},
    **{"settings": "--set", "recipe_settings": "--set-recipe", "axes": "--axis"},
}
"""Key of a study -> the option that sets it."""


@cli.command()
@click.argument("studies", metavar="STUDY...", nargs=-1, required=True)
@out_option(
    "Folder of runs and results. Default: studies/STUDY. Of several studies, the folder of their "
    "folders. Default: studies."
)
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
@click.option(
    "--reuse/--no-reuse",
    default=True,
    show_default=True,
    help="Take a finished run that is the same in every respect from a study's folder beside OUT.",
)
@click.option("--dry-run", is_flag=True, help="List the runs and their state; run nothing.")
@common_options(data=True, device=True)
def ablate(
    studies: tuple[str, ...],
    out: Path | None,
    index: int,
    of: int,
    launcher: str,
    launcher_settings: tuple[str, ...],
    reuse: bool,
    dry_run: bool,
    common: Common,
    **changes: Any,
) -> None:
    """Run STUDY, a [study.STUDY] table of the registry: train each variant with each seed,
    evaluate it, and write one table of the results.

    Nothing runs before the whole grid is validated. Finished runs are skipped, so the same command
    continues after Ctrl-C. A run that fails does not stop the others. Several processes can share
    the work: the same command again in another terminal, or --index and --of, each on one GPU
    (CUDA_VISIBLE_DEVICES); or --launcher hands every run to SLURM or Ray and watches them. Runs
    that several studies have in common are trained once (docs/studies.md).
    """
    registry = common.registry()
    studies = tuple(dict.fromkeys(studies))
    specs = {name: registry.study(name, _overrides(changes), by=OPTIONS) for name in studies}
    if not dry_run:
        common.check_device()
    from mfuser.config.study import AdapterStudySpec, StudySpec
    from mfuser.engine.processes import check_alone
    from mfuser.study.plans import AdapterPlan, TrainingPlan
    from mfuser.study.runs import Inputs

    check_alone("ablate")
    inputs = Inputs(common.registries, common.plugins, common.data_roots, common.device)
    plans: dict[str, Plan] = {}
    for name, spec in specs.items():
        folder = (
            (out or Path("studies") / name) if len(specs) == 1 else (out or Path("studies")) / name
        )
        if isinstance(spec, AdapterStudySpec):
            plans[name] = AdapterPlan(registry, name, spec, folder, inputs)
        else:
            assert isinstance(spec, StudySpec)
            plans[name] = TrainingPlan(registry, name, spec, folder, inputs, reuse)
    engine = Engine(launcher, launcher_settings)
    if len(plans) == 1:
        work(plans[studies[0]], studies[0], index, of, dry_run, common.as_json, engine=engine)
    else:
        _work_all(plans, index, of, dry_run, common.as_json, engine)


@dataclass(frozen=True)
class Engine:
    """Who runs a study's runs, and its options as they were given."""

    name: str = "local"
    settings: tuple[str, ...] = ()

    def run(self, jobs: list[Job], plan: Plan, console: Console) -> list[Trouble]:
        """Run the jobs; returns those that did not finish. Raises StudyInterrupted after Ctrl-C."""
        from mfuser.study.runs import work_through

        if self.name == "local":
            return work_through(jobs, console, plan.neighbors)
        from mfuser.study.launchers import open_launcher
        from mfuser.study.spread import spread

        launcher = open_launcher(self.name, self._options(), plan.folder)
        try:
            return spread(jobs, launcher, console, plan.neighbors)
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


def work(
    plan: Plan,
    study: str,
    index: int,
    of: int,
    dry_run: bool,
    as_json: bool,
    quiet: bool = False,
    engine: Engine = Engine(),
) -> Any:
    """Run what is left of a study; its results are shown and returned (None after a dry run)."""
    share = _shared(plan, study, index, of, engine)
    if dry_run:
        _list({study: plan}, share, as_json)
        return None
    plan.check()
    results, whole = _run(plan, study, share, as_json, engine)
    if as_json and not quiet:
        emit(results.model_dump(mode="json"))
    if not whole:
        raise click.exceptions.Exit(1)
    return results


def _work_all(
    plans: dict[str, Plan], index: int, of: int, dry_run: bool, as_json: bool, engine: Engine
) -> None:
    """Several studies, one after the other; all are checked before anything runs."""
    shares = {name: _shared(plan, name, index, of, engine) for name, plan in plans.items()}
    if dry_run:
        _list(plans, [job for share in shares.values() for job in share], as_json)
        return
    for plan in plans.values():
        plan.check()
    found = {name: _run(plan, name, shares[name], as_json, engine) for name, plan in plans.items()}
    if as_json:
        emit([results.model_dump(mode="json") for results, _ in found.values()])
    if not all(whole for _, whole in found.values()):
        raise click.exceptions.Exit(1)


def _shared(plan: Plan, study: str, index: int, of: int, engine: Engine) -> list[Job]:
    from mfuser.study import runs

    engine.check(of)
    share = runs.share(plan.jobs, index, of)
    runs.check_study(plan.folder, study, plan.identities)
    return share


def _run(
    plan: Plan, study: str, share: list[Job], as_json: bool, engine: Engine
) -> tuple[Any, bool]:
    """The results of a study, and whether every run of the share finished."""
    from mfuser.engine.console import Console
    from mfuser.reporting.tables import show
    from mfuser.study import runs
    from mfuser.study.results import save

    runs.open_study(plan.folder, study, plan.identities)
    console = Console()
    try:
        troubles = engine.run(share, plan, console)
    except runs.StudyInterrupted as stop:
        console.say(
            f"{stop}. What is finished stays; the same command goes on from here:\n"
            f"  mfuser {shlex.join(sys.argv[1:])}"
        )
        raise click.exceptions.Exit(exit_code(stop.signal)) from stop
    results = plan.results()
    without_plot = save(results, plan.folder)
    if without_plot:
        console.say(without_plot)
    if not as_json:
        show(*results.tables(), *results.summary(), f"results: {plan.folder / 'results.md'}")
    if troubles:
        console.say(f"{len(troubles)} of {len(share)} runs did not finish:")
        for job, status, message in troubles:
            console.say(f"  {job.label} {status}: {message}")
    return results, not troubles


def _list(plans: dict[str, Plan], jobs: list[Job], as_json: bool) -> None:
    """The runs and their state; how many of them are left, and how many of these differ."""
    from mfuser.study.reuse import same_runs

    by_folder = {job.folder: plan for plan in plans.values() for job in plan.jobs}
    sources = {}
    for job in jobs:
        neighbors = by_folder[job.folder].neighbors
        sources[job.folder] = neighbors.offer(job) if neighbors is not None else None
    if as_json:
        emit(
            [
                {
                    "run": job.label,
                    "folder": str(job.folder),
                    "state": job.state()[0],
                    "elsewhere": sources[job.folder],
                }
                for job in jobs
            ]
        )
        return
    from mfuser.reporting.tables import Table

    rows = []
    for job in jobs:
        source = sources[job.folder]
        rows.append((job.label, f"in {source}" if source else job.state()[0], str(job.folder)))
    click.echo("\n".join(Table(("run", "state", "folder"), rows, left=3).lines()))
    left = [
        job
        for job in jobs
        if not sources[job.folder] and job.state()[0] not in ("finished", "diverged")
    ]
    trained = [job for job in left if by_folder[job.folder].neighbors is not None]
    different = len(left) - len(trained) + same_runs(trained)
    where = ", ".join(str(plan.folder) for plan in plans.values())
    told = f"{len(jobs)} runs in {where}, {len(left)} to do"
    click.echo(told + (f", of which {different} differ" if different < len(left) else ""))


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
