"""Commands for datasets on disk: `data new` and `data check`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfuser.cli import Group, cli, emit
from mfuser.cli.options import Common, common_options
from mfuser.errors import DataError, NoSplitError, RegistryError, legible, suggest

if TYPE_CHECKING:
    from mfuser.config.registry import Registry
    from mfuser.specs import Proposal

STEPS = 300
"""Steps of the recipe that `data new` writes: minutes on two cores with small towers."""

VALIDATIONS = 3
"""Times that such a run is measured on the way, and on how many images: seconds each."""
VALIDATED = 4

ACROSS = 4
"""Windows that fit across the shorter side of a photograph; larger ones are trained and tested at a
smaller size, where a window of the small pairing shows more than a corner of a leaf."""
LEAST = 0.1
"""The smallest factor that augmentation takes."""

SLOTS = 16
"""Tokens of a class name, start and end included: small vocabularies spell names out."""


@cli.group(cls=Group)
def data() -> None:
    """Datasets on disk."""


@data.command("new")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", default=None, help="Name of the dataset. Default: the folder's name.")
@click.option(
    "--classes", default=None, metavar="A,B,…", help="Class names in the order of their ids."
)
@click.option(
    "--pairing",
    default="demo-scratch",
    show_default=True,
    metavar="NAME",
    help="The pairing that the dataset's own one extends; the default downloads nothing.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("registry.toml"),
    show_default=True,
    metavar="FILE",
    help="The registry file that takes the tables.",
)
@click.option("--dry-run", is_flag=True, help="Print the tables, write nothing.")
@common_options()
def new(
    folder: Path,
    name: str | None,
    classes: str | None,
    pairing: str,
    out: Path,
    dry_run: bool,
    common: Common,
) -> None:
    """Inspect FOLDER and write the registry tables to train on it.

    Finds images and masks, their classes with the share of each, and how train and val are told
    apart; writes [dataset.NAME], a pairing with its classes and a recipe into ./registry.toml.
    """
    registry = common.registry()
    if not folder.is_dir():
        raise click.UsageError(f"there is no folder {folder}")
    name = name or re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-").lower()
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name or ""):
        raise click.UsageError(f"'{name}' cannot name a dataset; give --name, e.g. --name garden")
    component, proposal = _propose(registry, folder)
    tables = _tables(registry, name, component, _renamed(proposal, classes), pairing, folder, out)
    from mfuser.config.edit import add_tables, toml_value

    if dry_run:
        text = "\n\n".join(
            "\n".join([f"[{table}]", *(f"{k} = {toml_value(v)}" for k, v in keys.items())])
            for table, keys in tables.items()
        )
    else:
        text = add_tables(out, tables)
    if common.as_json:
        emit({"tables": tables, "found": proposal.found, "odd": proposal.odd, "file": str(out)})
        return
    for sentence in proposal.found:
        click.echo(sentence)
    if size := tables[f"dataset.{name}"].get("test_size"):
        factor = size[0] / proposal.size[0] if proposal.size else 1.0
        click.echo(
            f"large for this pairing's window: trained and tested at {size[0]}x{size[1]} "
            f"(test_size, augmentation.scale); new photographs: mfuser predict --scale {factor:.2g}"
        )
    for sentence in proposal.odd:
        click.secho(f"odd: {sentence}", fg="yellow")
    click.echo(f"\n{text}\n")
    if not dry_run:
        click.echo(f"written to {out}; next: mfuser data check {name}, then mfuser train {name}")


def _propose(registry: Registry, folder: Path) -> tuple[str, Proposal]:
    """The surest reader's proposal. Raises DataError where none recognizes the folder."""
    best: tuple[float, str, Proposal] | None = None
    for component in registry.components.kind("dataset").values():
        proposal = component.spec.propose(folder)  # type: ignore[attr-defined]
        if proposal is not None and (best is None or proposal.score > best[0]):
            best = (proposal.score, component.name, proposal)
    if best is None:
        raise DataError(
            f"{folder} holds no images with masks that pair up: masks are PNG files (one id or "
            "color per class) with the stems of their images, in a folder of their own or with a "
            "suffix such as _mask"
        )
    return best[1], best[2]


def _renamed(proposal: Proposal, classes: str | None) -> Proposal:
    """The proposal with the names that the user gives, in the order of the ids (or colors)."""
    if classes is None:
        return proposal
    from dataclasses import replace

    names = tuple(part.strip() for part in classes.split(",") if part.strip())
    options = dict(proposal.options)
    table = options["classes"]
    if len(names) == len(table):
        options["classes"] = (
            dict(zip(table, names, strict=True)) if isinstance(table, dict) else list(names)
        )
    elif isinstance(table, dict) and list(table) == [str(i) for i in range(1, len(names) + 1)]:
        options["classes"] = dict(zip(table, names, strict=True))
    elif isinstance(table, dict) and all(k.isdecimal() and int(k) < len(names) for k in table):
        options["classes"] = list(names)  # the sample does not show every class
    else:
        keys = ", ".join(table)
        raise click.UsageError(
            f"--classes names {len(names)} classes, and the masks hold {len(table)}: {keys}"
        )
    table = options["classes"]
    kept = tuple(dict.fromkeys(table.values() if isinstance(table, dict) else table))
    return replace(proposal, options=options, classes=kept)


def _tables(
    registry: Registry,
    name: str,
    component: str,
    proposal: Proposal,
    pairing: str,
    folder: Path,
    out: Path,
) -> dict[str, dict[str, Any]]:
    """The registry tables, tried before they are written."""
    if pairing not in registry.names("pairing"):
        known = registry.names("pairing")
        raise RegistryError(f"no pairing is called '{pairing}'{suggest(pairing, known)}")
    classes = [c for c in proposal.classes if c.lower() not in ("ignore", "void", "unlabeled")]
    registry.components.validate(("dataset",), {"name": component, **proposal.options})
    registry.pairing(pairing, {"classes": classes})
    recipe = registry.recipe_of(pairing)
    try:
        where = str(folder.resolve().relative_to(out.resolve().parent))
    except ValueError:
        where = str(folder.resolve())
    if legible(where) != where:
        raise DataError(
            f"{legible(where)} is not UTF-8, and a registry file holds nothing else: rename the "
            "folder, or give it another name by a symbolic link"
        )
    options, begun = dict(proposal.options), registry.recipe(recipe)
    own: dict[str, Any] = {"steps": STEPS, "warmup": min(STEPS // 10, begun.warmup)}
    if any(key in options for key in ("val_share", "lists")) or "{split}" in options.get(
        "images", ""
    ):
        own |= {"validate_every": STEPS // VALIDATIONS, "validate_images": VALIDATED}
    factor = _factor(proposal, registry.pairing(pairing).image_size)
    if factor < 1 and proposal.size is not None:
        options["test_size"] = [round(side * factor) for side in proposal.size]
        scale = [max(LEAST, round(factor * side, 3)) for side in begun.augmentation.scale]
        own["augmentation"] = {"scale": scale}
    return {
        "data": {name: where},
        f"dataset.{name}": {"name": component, **options},
        f"pairing.{name}": {"extends": pairing, "classes": classes, "prompt": {"slots": SLOTS}},
        f"recipe.{name}": {
            "extends": recipe,
            "source": name,
            "targets": [name],
            **own,
            "note": "",  # what the extended recipe says is of other data
        },
    }


def _factor(proposal: Proposal, window: tuple[int, int]) -> float:
    """By which photographs are resized: 1 but for large ones."""
    if proposal.size is None:
        return 1.0
    factor = ACROSS * min(window) / min(proposal.size)
    return max(LEAST, factor) if factor < 0.75 else 1.0


@data.command("check")
@click.argument("datasets", nargs=-1)
@click.option("--full", is_flag=True, help="Open every file, not a sample.")
@common_options(data=True)
def check(
    datasets: tuple[str, ...],
    full: bool,
    common: Common,
) -> None:
    """Check which of DATASETS (default: all) are on disk, what is missing and what looks wrong."""
    registry = common.registry()
    from mfuser.engine.console import Console

    wanted = datasets or tuple(
        dict.fromkeys([*registry.components.kind("dataset"), *registry.names("dataset")])
    )
    console = Console(quiet=common.as_json)
    failed, shown = False, []
    for reference in wanted:
        try:
            found = _check_one(registry, reference, full, console)
        except RegistryError:
            if datasets:
                raise
            continue  # a component that cannot be named without options
        failed = failed or any("missing" in e or e.get("problems") for e in found)
        shown += found
        if not common.as_json:
            for entry in found:
                _show(entry)
    if common.as_json:
        emit(shown)
    if datasets and failed:
        raise click.exceptions.Exit(2)


def _check_one(
    registry: Registry, reference: str, full: bool, console: Any
) -> list[dict[str, Any]]:
    from mfuser.config.run import domains
    from mfuser.errors import MFuserError
    from mfuser.reporting.dataset_check import check_dataset, to_open

    entries: list[dict[str, Any]] = []
    for part, domain in zip(
        registry.dataset(reference).expand(), domains(registry, reference), strict=True
    ):
        for split in (part.split,) if part.split else ("train", "val"):
            entry: dict[str, Any] = {"dataset": domain.name, "split": split}
            try:
                built = domain.build(registry, split)
                label, count = f"{domain.name} ({split})", to_open(built, full)
                with console.task(label, count) as task:
                    official = part.official_count(split)
                    entry = check_dataset(
                        domain.name, split, built, official=official, full=full, opened=task.advance
                    ).as_dict()
            except NoSplitError as error:
                entry["absent"] = str(error)
            except MFuserError as error:
                entry["missing"] = str(error)
            entries.append(entry)
    return entries


def _show(entry: dict[str, Any]) -> None:
    head = f"{entry['dataset']} ({entry['split']})"
    for key in ("missing", "absent"):
        if key in entry:
            click.echo(f"{head}: {entry[key]}")
            return
    sizes = list(entry["sizes"].items())
    text = ", ".join(f"{size} ({n})" for size, n in sizes[:3])
    more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
    official = f" of {entry['official']}" if entry["official"] is not None else ""
    click.echo(
        f"{head}: {entry['images']}{official} images, {entry['opened']} opened: {text}{more}"
    )
    shares = sorted(entry["classes"].items(), key=lambda item: -item[1])
    if shares:
        listed = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        click.echo(f"  classes: {listed}; ignored {entry['ignored']:.1%}")
    if entry["values"]:
        listed = ", ".join(f"{v}: {share:.1%}" for v, share in list(entry["values"].items())[:16])
        click.echo(f"  stored values: {listed}")
    for sentence in entry["problems"]:
        click.secho(f"  problem: {sentence}", fg="red")
    for sentence in entry["warnings"]:
        click.secho(f"  odd: {sentence}", fg="yellow")
