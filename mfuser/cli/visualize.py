"""Commands that draw what a model sees: `visualize pca`, `similarity`, `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfuser.cli import Group, cli, emit
from mfuser.cli.options import (
    Command,
    Common,
    Decorator,
    common_options,
    scale_option,
    set_option,
    stride_option,
)

if TYPE_CHECKING:
    from mfuser.config.registry import Registry
    from mfuser.engine.visualize import Canvas
    from mfuser.model.dgss import DGSSModel


def drawing_options(scale: str, *, data: bool = False) -> Decorator:
    """Options of every picture; `_canvas` takes their values. scale: the default of --scale.

    data: with --data-root.
    """

    def add(command: Command) -> Command:
        for option in (
            common_options(data=data, device=True),
            stride_option,
            scale_option(scale),
            click.option("--recursive", is_flag=True,
                         help="Also in the folders below those given."),
            click.option("--width", type=click.IntRange(32, 4096), default=384, show_default=True,
                         help="Of a panel on the sheets, in pixels."),
            click.option("--out", type=click.Path(path_type=Path), default=Path("pictures"),
                         show_default=True, help="Folder of the pictures."),
        ):  # fmt: skip
            command = option(command)
        return command

    return add


@cli.group(cls=Group)
def visualize() -> None:
    """Pictures of what a model sees: features, similarity to words, masks side by side."""


@visualize.command("pca")
@click.argument("model", metavar="RUN|PAIRING")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@set_option
@drawing_options("fit")
def pca_command(
    model: str, images: tuple[Path, ...], settings: tuple[str, ...], **shared: Any
) -> None:
    """The first three principal components of each encoder's features, before and after fusion.

    Of RUN (a folder or a checkpoint), or of a PAIRING before any training. Before: each encoder
    alone, as it was before training. After: with what the fusion adapters add. Features are the
    patch tokens after the last block; the components are common to all IMAGES.
    """
    registry, canvas = _canvas(**shared)
    from mfuser.engine import visualize as engine

    paths = _images(images, shared["recursive"], canvas)
    fused, run = _model(registry, model, settings, canvas)
    _done(
        engine.pca(fused, engine.before(fused, run.get("seed", 0)), paths, canvas),
        shared["common"].as_json,
    )


@visualize.command("similarity")
@click.argument("run", metavar="RUN|PAIRING")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, required=True, metavar="WORDS",
              help="A class name or any words; may be given several times.")  # fmt: skip
@click.option("--before", "alone", is_flag=True,
              help="Also of the vision-language model alone, before training.")  # fmt: skip
@set_option
@drawing_options("fit")
def similarity_command(
    run: str,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    alone: bool,
    settings: tuple[str, ...],
    **shared: Any,
) -> None:
    """How near every place of IMAGES is to words: cosines in the joint space of texts and patches.

    A class of the model is answered by its own query, other words by a query made like those.
    """
    registry, canvas = _canvas(**shared)
    from mfuser.engine import visualize as engine

    paths = _images(images, shared["recursive"], canvas)
    model, record = _model(registry, run, settings, canvas)
    untrained = engine.before(model, record.get("seed", 0)) if alone else None
    _done(engine.text_maps(model, paths, texts, canvas, untrained), shared["common"].as_json)


@visualize.command("compare")
@click.argument("given", metavar="RUN... [IMAGES]...", nargs=-1, required=True,
                type=click.Path(path_type=Path))  # fmt: skip
@click.option("--dataset", default=None, metavar="NAME",
              help="Take images from a dataset, and draw their targets.")  # fmt: skip
@click.option("--split", type=click.Choice(["train", "val"]), default="val", show_default=True,
              help="Of --dataset.")  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), default=4, show_default=True,
              help="Images of --dataset, evenly spaced.")  # fmt: skip
@drawing_options("auto", data=True)
def compare_command(
    given: tuple[Path, ...],
    dataset: str | None,
    split: str,
    count: int,
    **shared: Any,
) -> None:
    """Predictions of several RUNS on the same IMAGES, beside each other and beside the target."""
    registry, canvas = _canvas(**shared)
    from mfuser.engine import visualize as engine
    from mfuser.engine.checkpoints import holds_run
    from mfuser.engine.inference import of_record
    from mfuser.engine.inputs import file_names

    runs = list(dict.fromkeys(path for path in given if holds_run(path)))
    rest = tuple(path for path in given if path not in runs)
    if not runs:
        raise click.UsageError("none of these is a run: a run folder or a checkpoint file")
    if bool(rest) == bool(dataset):
        raise click.UsageError("give images, or --dataset NAME, beside the runs; one of the two")
    labeled = None
    if dataset is not None:
        from mfuser.config.run import domains

        found = domains(registry, dataset)
        if len(found) > 1:
            names = ", ".join(domain.name for domain in found)
            raise click.UsageError(f"--dataset {dataset} is several: {names}; give one of them")
        labeled = engine.Labeled(found[0].build(registry, split), count)
    paths = _images(rest, shared["recursive"], canvas) if rest else []
    models = {}
    for name, run in zip(file_names(runs), runs, strict=True):
        model, record = _model(registry, str(run), (), canvas)
        models[name] = model, of_record(registry, record, str(run), stride=canvas.stride).build()
    _done(engine.compare(models, paths, canvas, labeled), shared["common"].as_json)


def _canvas(
    out: Path,
    width: int,
    scale: float | str,
    stride: tuple[int, int] | None,
    common: Common,
    **_: Any,
) -> tuple[Registry, Canvas]:
    registry = common.registry()
    device = common.check_device()
    import torch

    from mfuser.engine.processes import check_alone
    from mfuser.engine.visualize import Canvas
    from mfuser.reporting.adapter_cost import default_device

    check_alone("visualize")
    where = torch.device(device or default_device())
    return registry, Canvas(out, scale, stride, width, where)  # type: ignore[arg-type]


def _images(given: tuple[Path, ...], recursive: bool, canvas: Canvas) -> list[Path]:
    from mfuser.engine import inputs

    found = inputs.find(given, recursive)
    inputs.tell(found.unknown, "not images", canvas.console.say)
    inputs.tell(found.videos, "videos", canvas.console.say)
    if not found.images:
        raise click.UsageError("these are videos; give photographs")
    return list(dict.fromkeys(found.images))


def _model(
    registry: Registry, reference: str, settings: tuple[str, ...], canvas: Canvas
) -> tuple[DGSSModel, dict[str, Any]]:
    """The model of a run or of a pairing, and the record of the run."""
    from mfuser.engine.checkpoints import load_model
    from mfuser.model.assembly import build_model

    if not Path(reference).exists() and reference in registry.names("pairing"):
        return build_model(registry.pairing(reference, settings)).to(canvas.device), {}
    model, checkpoint = load_model(Path(reference), registry, list(settings))
    return model.to(canvas.device), checkpoint.meta["run"]


def _done(written: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(written)
    else:
        click.echo(f"{len(written['images'])} images: {', '.join(written['sheets'])}")
