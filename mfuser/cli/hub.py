"""The commands that publish a model and fetch one."""

from __future__ import annotations

from pathlib import Path

import click

from mfuser.cli import cli, emit
from mfuser.cli.options import (
    Common,
    common_options,
    json_option,
    set_option,
    weights_option,
)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME|FOLDER")
@click.option("--full", is_flag=True, help="All weights, also those of frozen encoders.")
@click.option("--public", is_flag=True, help="Make the repository public; it is private else.")
@click.option("--license", default=None, metavar="ID",
              help="Of the trained weights, for the card, e.g. apache-2.0.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, without any request.")
@weights_option
@set_option
@common_options()
def push(
    run: Path,
    repo: str,
    full: bool,
    public: bool,
    license: str | None,
    dry_run: bool,
    weights: str | None,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Publish the model of RUN as the repository OWNER/NAME of the Hugging Face hub, or in a FOLDER
    such as ./garden.

    Uploaded are the trained weights, the configuration and a model card made from the report.
    A new repository is private. Needs a login: hf auth login, or HF_TOKEN.
    """
    registry = common.registry()
    from mfuser.engine.hub import in_folder
    from mfuser.engine.hub import push as push_run

    done = push_run(
        registry,
        run,
        repo,
        full=full,
        public=public,
        license=license,
        settings=settings,
        weights=weights,
        dry_run=dry_run,
    )
    if common.as_json:
        emit(done.as_dict())
        return
    kind = "private" if done.private else "public"
    if in_folder(repo) is not None:
        what, where = ("would be written to" if dry_run else "written to"), f"{repo}:"
    else:
        what = "would be uploaded to" if done.url is None else "uploaded to"
        where = f"{repo} ({kind}): {done.url or ''}".rstrip()
    click.echo(f"{what} {where}")
    for name, size in done.files.items():
        click.echo(f"  {name:<18} {size / 1e6:>10,.3f} MB")
    for note in done.notes:
        click.echo(f"note: {note}")


@cli.command()
@click.argument("repo", metavar="OWNER/NAME|FOLDER")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--revision", default=None, help="Branch, tag or commit.")
@json_option
def pull(repo: str, folder: Path, revision: str | None, as_json: bool) -> None:
    """Fetch the repository OWNER/NAME of the Hugging Face hub, or what was pushed into a folder
    such as ./garden, into FOLDER.

    Commands take FOLDER as a run: mfuser predict FOLDER photos/
    """
    from mfuser.engine.hub import pull as pull_repo

    meta = pull_repo(repo, folder, revision=revision).meta
    classes = meta["pairing"].get("classes") or ()
    if as_json:
        emit({"folder": str(folder), "step": meta["step"], "classes": list(classes)})
        return
    click.echo(f"{folder}: {len(classes)} classes, trained for {meta['step']} steps")
    click.echo(f"  mfuser predict {folder} PHOTOS")
