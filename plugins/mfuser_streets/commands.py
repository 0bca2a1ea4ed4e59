"""`mfuser world …`: pretrain the towers in miniature. torch is imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from mfuser.cli import INTERRUPTED, Group, emit

TOWERS = ("vfm", "vlm", "vfm+vlm", "random", "scratch")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
weights_options = (
    click.option("--vfm", type=click.Path(path_type=Path, exists=True), default=None,
                 help="Other weights than those that ship, or a pretraining's checkpoint."),
    click.option("--vlm", type=click.Path(path_type=Path, exists=True), default=None,
                 help="The same for mini-vlm."),
)  # fmt: skip
images_option = click.option(
    "--images", type=click.IntRange(min=1), default=100, show_default=True,
    help="Of each domain that is tested.",
)  # fmt: skip


def with_weights(command: Any) -> Any:
    for option in weights_options:
        command = option(command)
    return command


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
@json_option
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


@world.command()
@click.argument("names", nargs=-1, type=click.Choice(TOWERS), metavar="[TOWER]...")
@click.option("--head", type=click.Choice(["linear", "mlp"]), default="linear", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--train",
    "train_images",
    type=click.IntRange(min=16),
    default=800,
    show_default=True,
    help="Images of the source to train on.",
)
@click.option("--steps", type=click.IntRange(min=1), default=600, show_default=True)
@click.option("--development", is_flag=True, help="Test on the development styles instead.")
@images_option
@with_weights
@json_option
def probe(
    names: tuple[str, ...],
    head: Literal["linear", "mlp"],
    seeds: int,
    train_images: int,
    steps: int,
    development: bool,
    images: int,
    vfm: Path | None,
    vlm: Path | None,
    as_json: bool,
) -> None:
    """Probes on frozen features of TOWERs, trained on the source and tested on unseen domains.

    vfm, vlm, both, a random tower; "scratch" trains the same tower end to end on the source. With
    vfm+vlm the oracle of the two towers' single probes is scored too: per pixel whichever is right.
    """
    from mfuser_streets import evidence
    from mfuser_streets import probe as probing

    tests = ("game", "development") if development else ("game", *probing.TARGETS)
    rows = evidence.probes(
        names or ("random", "vfm", "vlm", "vfm+vlm"), head, seeds, train_images, steps, images,
        tests, {"vfm": vfm, "vlm": vlm},
        say=None if as_json else click.echo,
    )  # fmt: skip
    if as_json:
        emit(rows)


@world.command()
@images_option
@with_weights
@json_option
def words(images: int, vfm: Path | None, vlm: Path | None, as_json: bool) -> None:
    """How well the class words of mini-vlm tell its patches apart: area under the ROC curve."""
    from mfuser_streets import evidence

    found = evidence.words(images, vlm)
    if as_json:
        emit(found)
        return
    for domain, aucs in found.items():
        worst = sorted(aucs, key=lambda name: aucs[name])[:3]
        told = ", ".join(f"{name} {aucs[name]:.2f}" for name in worst)
        click.echo(f"{domain}: mean {sum(aucs.values()) / len(aucs):.3f}; lowest {told}")


@world.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@with_weights
def pca(out: Path, vfm: Path | None, vlm: Path | None) -> None:
    """A picture of what the towers see: main directions of their features, in color, and the map
    of one class word."""
    from mfuser_streets import evidence

    evidence.pca_picture(out, vfm, vlm)
    click.echo(str(out))


@world.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def show(out: Path) -> None:
    """A picture of the world: the source, the five targets, and every family of the space."""
    from mfuser_streets import evidence

    evidence.world_picture(out)
    click.echo(str(out))
