"""Commands that work: train, evaluate, predict."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mfuser.cli import cli, emit
from mfuser.cli.options import (
    Common,
    Resumable,
    common_options,
    compile_option,
    inference_options,
    out_option,
    precision_option,
    recipe_option,
    resume_option,
    scale_option,
    set_option,
    set_recipe_option,
    source_option,
    targets_option,
    weights_option,
    workers_option,
)
from mfuser.engine import signals

if TYPE_CHECKING:
    from mfuser.config.registry import Registry
    from mfuser.engine.folder import Resume
    from mfuser.model.window_batch import WindowBatch
    from mfuser.reporting.report import Report

RESUME: dict[str | None, Resume] = {None: False, "yes": True, "auto": "auto"}


@cli.command(cls=Resumable)
@click.argument("pairing")
@recipe_option(
    "Recipe to train with. Default: the one named like the pairing, or like one that it extends, "
    "else 'paper'."
)
@source_option(
    "Dataset to train on, or several: gta,synthia or gta=0.7,synthia=0.3. Default: the recipe's."
)
@targets_option("Domains to test on. Default: the recipe's.")
@out_option("Run folder. Default: runs/PAIRING.")
@click.option("--steps", type=int, default=None, help="Same as --set-recipe steps=N.")
@click.option("--seed", type=int, default=None, help="Same as --set-recipe seed=N.")
@resume_option
@click.option(
    "--requeue", is_flag=True, help="When a scheduler's signal ends it, put the SLURM job back."
)
@click.option(
    "--replay", is_flag=True, help="Repeat the step at which the run in --out lost its loss."
)
@set_option
@set_recipe_option
@click.option("--compile", is_flag=True, help="Same as --set-recipe compile=true.")
@click.option("--no-evaluate", is_flag=True, help="Stop after training.")
@common_options(data=True, device=True)
def train(
    pairing: str,
    recipe: str | None,
    source: str | None,
    targets: str | None,
    out: Path | None,
    steps: int | None,
    seed: int | None,
    resume: str | None,
    requeue: bool,
    replay: bool,
    settings: tuple[str, ...],
    recipe_settings: tuple[str, ...],
    compile: bool,
    no_evaluate: bool,
    common: Common,
) -> None:
    """Train PAIRING on a source, then evaluate it on the targets: report and pictures in --out.

    Ctrl-C saves and says how to resume; so does a scheduler's SIGTERM or SIGUSR1 (exit code 75).
    On several GPUs: torchrun --nproc_per_node N -m mfuser train …
    """
    registry = common.registry()
    folder = out or Path("runs") / pairing
    if replay:
        _replay(registry, folder, settings, common)
        return
    changes = [*(["compile=true"] if compile else []), *recipe_settings]
    changes += [f"steps={steps}"] if steps is not None else []
    changes += [f"seed={seed}"] if seed is not None else []
    from mfuser.engine.console import Console
    from mfuser.engine.run import resolve
    from mfuser.engine.run import train as train_run
    from mfuser.engine.train import Interrupted

    console = Console(quiet=not first())
    run = resolve(
        registry, pairing, recipe, source, _split(targets), settings, changes, console=console
    )
    device = common.check_device()
    try:
        done = train_run(
            run,
            folder,
            registry=registry,
            resume=RESUME[resume],
            evaluate=not no_evaluate,
            device=device,
        )
    except Interrupted as stop:
        arguments = sys.argv[1:] if resume else [*sys.argv[1:], "--resume"]
        by = "" if stop.signal == signal.SIGINT else f" by {signals.named(stop.signal)}"
        console.say(
            f"interrupted{by} after step {stop.step}; all is saved in {folder}. To go on:\n"
            f"  {_program()} {shlex.join(arguments)}"
        )
        code = signals.exit_code(stop.signal)
        if requeue and code == signals.REQUEUE and first():
            console.say(signals.requeue())
        raise click.exceptions.Exit(code) from stop
    except signals.Ended:  # before the first step or while it was evaluated: `main` says so
        if requeue and first():
            console.say(signals.requeue())
        raise
    if done.report is not None:
        _show(done.report, folder, common.as_json, done.pictures)
    elif first():
        emit({"run": str(folder)}) if common.as_json else click.echo(f"trained: {folder}")


def _replay(registry: Registry, folder: Path, settings: tuple[str, ...], common: Common) -> None:
    """Repeat the failed step: it fails as the run did, or shows that a change has helped."""
    from mfuser.engine.diagnose import replay

    losses = replay(registry, folder, settings=settings, device=common.check_device())
    if common.as_json:
        emit({"run": str(folder), "losses": losses})
    else:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
        click.echo(f"the losses of that step are finite now: {shown}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@targets_option("Domains to test on. Default: the run's.")
@out_option("Folder of the report. Default: the run's.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=None,
    help="Score only the first so many images of each domain.",
)
@click.option("--baselines", is_flag=True, help="Also score the untrained model.")
@weights_option
@precision_option
@inference_options
@workers_option
@compile_option
@set_option
@common_options(data=True, device=True)
def evaluate(
    run: Path,
    targets: str | None,
    out: Path | None,
    limit: int | None,
    baselines: bool,
    weights: str | None,
    precision: str,
    inference: str | None,
    stride: tuple[int, int] | None,
    window_batch: WindowBatch | None,
    workers: int | None,
    compile: bool,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Score RUN (a folder or a checkpoint) on several domains at once: IoU, mIoU, average.

    Several GPUs share the images: torchrun --nproc_per_node N -m mfuser evaluate …
    """
    registry = common.registry()
    device = common.check_device()
    from mfuser.engine.run import evaluate as evaluate_run

    done = evaluate_run(
        run,
        registry=registry,
        targets=_split(targets),
        settings=settings,
        out=out,
        device=device,
        inference=inference,
        stride=stride,
        window_batch=window_batch,
        workers=workers,
        limit=limit,
        baselines=baselines,
        weights=weights,
        compile=compile,
        precision=precision,  # type: ignore[arg-type]
    )
    _show(done.report, done.folder, common.as_json, done.pictures)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("predictions"),
    show_default=True,
    help="Folder of masks and overlays.",
)
@click.option("--recursive", is_flag=True, help="Also in the folders below those given.")
@scale_option("1")
@click.option(
    "--scores",
    type=click.Choice(["npz", "png", "bravo"]),
    default=None,
    help="Also write class probabilities (float16), an 8-bit picture of the confidence, or the "
    "files that the BRAVO challenge takes.",
)
@click.option(
    "--classes",
    default=None,
    metavar="A,B,…",
    help="Predict these alone; new names where the decoder reads any text.",
)
@click.option("--skip-bad", is_flag=True, help="Skip images that cannot be used.")
@weights_option
@precision_option
@inference_options
@workers_option
@compile_option
@set_option
@common_options(device=True)
def predict(
    run: Path,
    images: tuple[Path, ...],
    out: Path,
    recursive: bool,
    scale: float | str,
    scores: str | None,
    classes: str | None,
    skip_bad: bool,
    weights: str | None,
    precision: str,
    inference: str | None,
    stride: tuple[int, int] | None,
    window_batch: WindowBatch | None,
    workers: int | None,
    compile: bool,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Write masks and overlays of IMAGES (photographs, videos, folders), predicted by RUN.

    Hidden files and what an earlier call wrote are passed over in folders.
    """
    registry = common.registry()
    device = common.check_device()
    from mfuser.engine import inputs
    from mfuser.engine.console import Console
    from mfuser.engine.predict import predict as predict_images
    from mfuser.engine.processes import check_alone

    check_alone("predict")
    console, found = Console(), inputs.find(images, recursive)
    inputs.tell(found.unknown, "not images", console.say)
    written = predict_images(
        registry,
        run,
        [*found.images, *found.videos],
        out,
        settings=settings,
        device=device,
        scale=scale,  # type: ignore[arg-type]
        inference=inference,
        stride=stride,
        window_batch=window_batch,
        workers=workers,
        skip_unreadable=skip_bad,
        scores=scores,  # type: ignore[arg-type]
        weights=weights,
        compile=compile,
        precision=precision,  # type: ignore[arg-type]
        classes=None if classes is None else _split(classes, "--classes", "class"),
        console=console,
    )
    done = [entry for entry in written if "mask" in entry]
    if common.as_json:
        emit(written)
    else:
        skipped = f"; {len(written) - len(done)} skipped" if len(done) < len(written) else ""
        click.echo(f"{len(done)} masks and overlays in {out}{skipped}")
    if not done:
        raise click.exceptions.Exit(2)


def first() -> bool:
    """Whether this is the process that speaks: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def _program() -> str:
    """The beginning of this command line, without its arguments."""
    world = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return "mfuser" if world == "1" else f"torchrun --nproc_per_node {world} -m mfuser"


def _split(names: str | None, option: str = "--targets", what: str = "dataset") -> tuple[str, ...]:
    if names is None:
        return ()
    found = tuple(n.strip() for n in names.split(",") if n.strip())
    if not found:
        raise click.UsageError(f"{option} names no {what}; leave it out for the default")
    return found


def _show(report: Report, folder: Path, as_json: bool, pictures: Sequence[str]) -> None:
    if not first():
        return
    if as_json:
        emit(report.as_json())
        return
    from mfuser.reporting.tables import show

    drawn = f", pictures: {folder / 'pictures'}" if pictures else ""
    show(report.table(), *report.summary(), f"report: {folder / 'report.html'}{drawn}")
