"""`mfuser world …`: pretrain the towers in miniature. torch is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from mfuser.cli import INTERRUPTED, Group, emit


@click.group(cls=Group)
def world() -> None:
    """The miniature world: pretraining of mini-vfm and mini-vlm, and what they are worth."""


@world.command()
@click.argument("tower", type=click.Choice(["vfm", "vlm"]))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of checkpoint and weights; what was begun there goes on. Default: "
    "runs/pretrain-TOWER.",
)
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Default: the recipe's.")
@click.option(
    "--decay",
    type=click.IntRange(min=0),
    default=None,
    help="Last steps, over which the learning rate falls to 0. Default: the recipe's.",
)
@click.option("--seed", type=click.IntRange(min=0), default=None, help="Default: the recipe's.")
@click.option(
    "--without",
    "left_out",
    multiple=True,
    type=click.Choice(["contrast", "masked", "geometry", "words"]),
    help="Leave out a loss, to see what it contributes.",
)
@click.option(
    "--save-every", type=click.IntRange(min=1), default=100, show_default=True, help="In steps."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def pretrain(
    tower: Literal["vfm", "vlm"],
    out: Path | None,
    steps: int | None,
    decay: int | None,
    seed: int | None,
    left_out: tuple[str, ...],
    save_every: int,
    as_json: bool,
) -> None:
    """Pretrain TOWER on the miniature world, on one thread; stopped at any moment, the same
    command goes on from the last checkpoint and comes to the same weights."""
    from mfuser_streets.pretrain.recipe import recipe
    from mfuser_streets.pretrain.run import CHECKPOINT, digest
    from mfuser_streets.pretrain.run import pretrain as run

    folder = out or Path("runs") / f"pretrain-{tower}"
    changes: dict[str, Any] = {"steps": steps, "decay": decay, "seed": seed}
    changes = {k: v for k, v in changes.items() if v is not None}
    changes |= dict.fromkeys(left_out, 0.0)
    plan = recipe(tower, **changes)

    def report(step: int, losses: dict[str, float], seconds: float) -> None:
        told = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        click.echo(f"step {step} of {plan.steps}: {told}; {seconds:.2f} s a step", err=as_json)

    try:
        path = run(plan, folder, save_every, report)
    except KeyboardInterrupt:
        saved = (folder / CHECKPOINT).is_file()
        click.echo(
            f"interrupted; the same command goes on from the last checkpoint in {folder}"
            if saved
            else "interrupted before the first checkpoint: nothing is saved",
            err=True,
        )
        raise click.exceptions.Exit(INTERRUPTED) from None
    if as_json:
        emit({"weights": str(path), "sha256": digest(path), "recipe": plan.as_json()})
    else:
        click.echo(f"weights: {path}\nsha256: {digest(path)}")
