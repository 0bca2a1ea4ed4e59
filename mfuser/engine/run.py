"""Train, evaluate, save: what the command line, a study and Python all call."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry, load_registry
from mfuser.config.run import Domain, RunSpec, domains
from mfuser.engine import evaluate as evaluation
from mfuser.engine import gallery
from mfuser.engine import train as training
from mfuser.engine.console import Console
from mfuser.engine.folder import Resume
from mfuser.engine.precision import Choice
from mfuser.engine.processes import Processes, processes
from mfuser.files import clear_leftovers
from mfuser.model.dgss import DGSSModel
from mfuser.reporting import page
from mfuser.reporting.report import Report

PICTURES = "pictures"


@dataclass(frozen=True)
class TrainedRun:
    """model: on the device it was trained on, in eval mode. report: None where nothing was
    evaluated. pictures: of the report, relative to `folder`."""

    folder: Path
    model: DGSSModel
    report: Report | None
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluatedRun:
    """report: saved in `folder`. pictures: of the report, relative to `folder`."""

    folder: Path
    report: Report
    pictures: tuple[str, ...]


def train(
    pairing: str | RunSpec,
    folder: str | os.PathLike[str],
    *,
    registry: Registry | None = None,
    recipe: str | None = None,
    source: str | None = None,
    targets: Sequence[str] = (),
    settings: Sequence[str] = (),
    recipe_settings: Sequence[str] = (),
    resume: Resume = False,
    evaluate: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> TrainedRun:
    """Train a pairing on a source, then evaluate it on the targets; all is saved in `folder`.

        run = mfuser.train("camvid-small", "runs/a", recipe="camvid", targets=["camvid"])
        run.report.average  # mIoU over the unseen domains, in [0, 1]

    pairing: its name in the registry (or a resolved RunSpec, which makes the next four of no
        account). recipe: by default that of the pairing's name, or of the name of a pairing
        that it extends, else "paper". source, targets: datasets such as "gta" or "acdc:fog"; by
        default the recipe's. source may be several, with equal shares of the crops,
        "gta,synthia", or their own, "gta=0.7,synthia=0.3".
    settings, recipe_settings: changes such as "fusion.state_size=8" and "steps=400".
    folder: see `mfuser.engine.folder`. resume: go on in it from the last checkpoint
    ("auto": if it holds a run, else begin).
    evaluate: False stops after training. device: "cpu" or "cuda"; by default a GPU if there is one.
    quiet: say nothing on standard error.

    Called by each of several processes (torchrun), it works as one: all return the same report.

    Raises MFuserError: RegistryError for names and options, DataError for datasets and images,
    WeightsError for encoders' weights, CheckpointError for the folder (InUse where another process
    trains in it), Diverged where the loss is no longer a number. Raises Interrupted after Ctrl-C,
    SIGTERM or SIGUSR1, when the step at hand is saved.
    """
    registry, folder, console = registry or load_registry(), Path(folder), Console(quiet)
    if isinstance(pairing, RunSpec):
        run = pairing
    else:
        run = resolve(
            registry, pairing, recipe, source, targets, settings, recipe_settings, console=console
        )
    options = run.recipe
    with processes(options.precision, device) as group:
        done = training.train(registry, run, folder, resume=resume, console=console, joined=group)
        if not evaluate or not run.targets:
            return TrainedRun(folder, done.model, None)
        report = evaluation.assess(
            registry,
            done.model,
            done.run,
            done.step,
            group,
            baselines=options.baselines,
            pictures=folder / PICTURES,
            weights=done.weights,
            console=console,
        )
        return TrainedRun(folder, done.model, report, _save(report, folder, group))


def resolve(
    registry: Registry,
    pairing: str,
    recipe: str | None = None,
    source: str | None = None,
    targets: Sequence[str] = (),
    settings: Sequence[str] = (),
    recipe_settings: Sequence[str] = (),
    *,
    console: Console | None = None,
) -> RunSpec:
    """The run that names and settings stand for; fewer steps shorten the recipe's warm-up (which
    `console` says) and the steps to a measurement. Raises MFuserError for what is not known or
    refused."""
    name = recipe or registry.recipe_of(pairing)
    recipe_settings = _shortened(registry, name, recipe_settings, console or Console())
    return RunSpec.of(
        registry,
        pairing,
        name,
        pairing=registry.pairing(pairing, settings),
        recipe=registry.recipe(name, recipe_settings),
        source=source,
        targets=tuple(targets),
    )


def _shortened(
    registry: Registry, name: str, changes: Sequence[str], console: Console
) -> Sequence[str]:
    """`changes`, and where they leave fewer steps than the recipe warms up for, or a ramp
    of its takes, a warm-up and ramps of the same share of the steps as before; where fewer than to
    a measurement, one at the end."""
    given = {key.strip(): value for key, _, value in (c.partition("=") for c in changes)}
    if not given.get("steps", "").strip().isdecimal():
        return changes
    others = [c for c in changes if c.partition("=")[0].strip() != "steps"]
    before, steps = registry.recipe(name, others), int(given["steps"])
    more: list[str] = []
    if "validate_every" not in given and 0 < steps < (before.validate_every or 0):
        more.append(f"validate_every={steps}")
    if "warmup" not in given and 1 < steps <= before.warmup:
        warmup = before.warmup * steps // before.steps
        console.say(
            f"recipe '{name}' warms up for {before.warmup} of {before.steps} steps; with {steps} "
            f"steps it warms up for {warmup}"
        )
        more.append(f"warmup={warmup}")
    if not any(key.partition(".")[0] == "lr_ramp" for key in given):
        more += _ramped(name, before, steps, console)
    return [*changes, *more]


def _ramped(name: str, before: RecipeSpec, steps: int, console: Console) -> Sequence[str]:
    """The setting that brings ramps to their end within fewer steps, if need be, which is said."""
    ramps = {}
    for entry, (begin, full) in before.lr_ramp.items():
        if full > steps:
            start = begin * steps // before.steps
            ramps[entry] = [start, max(start + 1, full * steps // before.steps)]
            console.say(
                f"recipe '{name}' raises the rate of {entry} from step {begin} to {full} of "
                f"{before.steps}; with {steps} steps from {ramps[entry][0]} to {ramps[entry][1]}"
            )
    table = ", ".join(f"{json.dumps(entry)} = {ramp}" for entry, ramp in ramps.items())
    return [f"lr_ramp={{ {table} }}"] if ramps else []


def evaluate(
    run: str | os.PathLike[str],
    *,
    registry: Registry | None = None,
    targets: Sequence[str | Domain] = (),
    settings: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    inference: str | None = None,
    stride: tuple[int, int] | None = None,
    window_batch: int | Literal["auto"] | None = None,
    limit: int | None = None,
    baselines: bool = False,
    weights: str | None = None,
    workers: int | None = None,
    compile: bool = False,
    precision: Choice = "auto",
    quiet: bool = False,
) -> EvaluatedRun:
    """Score a run on several domains: a report and pictures are saved in `out`.

        mfuser.evaluate("runs/a", targets=["cityscapes", "acdc"]).report.domains["acdc:fog"].miou

    run: its folder, or a checkpoint file. targets: by default the run's own. settings: changes
    such as "vfm.weights=PATH", where the encoders' weights have moved, or "inference.flip=false".
    out: by default the run's
    folder. device: "cpu" or "cuda"; by default a GPU if there is one. inference: the component that
    segments images of any size, e.g. "multi_scale_flip"; by default the recipe's. stride: (height,
    width) of the sliding window's steps in pixels; by default the recipe's, else two thirds of the
    window. window_batch: windows that go through the model at once; "auto": as many as a GPU has
    memory for; by default the recipe's, else "auto".
    limit: only the first so many images of each domain. baselines: also score the untrained model.
    weights: "last", "averaged" or "best"; by default averaged ones where the run made some (ema).
    workers: threads that read images ahead while the device computes; 0: none; by default one on
    two cores, at most four. They change no figure.
    compile: by torch.compile; its options are settings such as "compile.mode=reduce-overhead".
    precision: "no" (float32), "bf16" or "fp16"; by default that of the training on a GPU, float32
    on a CPU.
    quiet: say nothing on standard error.

    Called by each of several processes (torchrun), they share the images and all return the same
    report. Scores are in [0, 1].

    Raises MFuserError: CheckpointError for the run, RegistryError and DataError for targets,
    WeightsError for the encoders' weights.
    """
    registry, path = registry or load_registry(), Path(run)
    chosen: list[Domain] = []
    for target in targets:
        chosen += domains(registry, target) if isinstance(target, str) else [target]
    folder = Path(out) if out is not None else (path if path.is_dir() else path.parent)
    with processes(device=device) as group:
        report = evaluation.evaluate(
            registry,
            path,
            targets=chosen or None,
            settings=settings,
            inference=inference,
            stride=stride,
            window_batch=window_batch,
            limit=limit,
            baselines=baselines,
            pictures=folder / PICTURES,
            weights=weights,
            workers=workers,
            compile=compile,
            precision=precision,
            console=Console(quiet),
            joined=group,
        )
        return EvaluatedRun(folder, report, _save(report, folder, group))


def _save(report: Report, folder: Path, group: Processes) -> tuple[str, ...]:
    """One report of all processes; returns its pictures, and no others that the folder holds."""
    names = [f"{PICTURES}/{gallery.picture(n)}" for n in ("overview", *report.domains)]
    drawn = tuple(name for name in names if (folder / name).is_file())

    def save() -> None:
        for written in (folder, folder / PICTURES):
            clear_leftovers(written)
        page.save(report, folder, list(drawn))

    group.from_main(save)
    return drawn
