"""The command that tells what a pairing costs on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from mfuser.cli import cli, emit
from mfuser.cli.options import (
    Common,
    common_options,
    recipe_option,
    set_option,
    set_recipe_option,
    source_option,
)


@cli.command()
@click.argument("pairing")
@recipe_option(
    "Recipe to measure. Default: the one named like the pairing, or like one that it extends, else "
    "'paper'."
)
@source_option("Dataset whose crops are timed, if it is here. Default: the recipe's.")
@set_option
@set_recipe_option
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True,
              help="Steps and images that are timed; the median counts.")  # fmt: skip
@click.option("--frame", type=click.IntRange(min=1), nargs=2, default=None,
              metavar="HEIGHT WIDTH", help="Also segment an image of this size.")  # fmt: skip
@click.option("--no-released", is_flag=True,
              help="With --frame: do not also segment as the released code does.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Folder for bench.json and a bar chart, bench.png.")  # fmt: skip
@common_options(data=True, device=True)
def bench(
    pairing: str,
    recipe: str | None,
    source: str | None,
    settings: tuple[str, ...],
    recipe_settings: tuple[str, ...],
    repeats: int,
    frame: tuple[int, int] | None,
    no_released: bool,
    out: Path | None,
    common: Common,
) -> None:
    """Time, memory and FLOPs of PAIRING, part by part, and what its whole recipe would take here.

    Weights are random and nothing is downloaded. --set-recipe precision=bf16, checkpointing=true,
    batch_size=4 show what these change.
    """
    registry = common.registry()
    from mfuser.engine.bench import bench as measure
    from mfuser.engine.bench import data_of
    from mfuser.engine.console import Console
    from mfuser.engine.run import resolve
    from mfuser.files import check_writable
    from mfuser.reporting.adapter_cost import default_device
    from mfuser.reporting.bench import save
    from mfuser.reporting.tables import show

    console = Console()
    run = resolve(registry, pairing, recipe, source, (), settings, recipe_settings, console=console)
    where = common.check_device() or default_device()
    if out is not None:
        check_writable(out)
    found = measure(
        run.pairing,
        run.recipe,
        pairing=pairing,
        recipe_name=run.recipe_name,
        device=where,
        repeats=repeats,
        frame=frame,
        released=not no_released,
        source=data_of(registry, run),
        say=console.say,
    )
    if out is not None:
        console.say(save(found, out) or f"written: {out}")
    if common.as_json:
        emit(found.model_dump(mode="json"))
    else:
        show(*found.tables(), *found.summary())
