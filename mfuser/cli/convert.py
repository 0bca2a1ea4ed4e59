"""The command that converts released checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from mfuser.cli import cli, emit
from mfuser.cli.options import (
    Common,
    common_options,
    set_option,
    source_option,
)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--pairing", required=True, metavar="NAME", help="The pairing it is a checkpoint of.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="A .safetensors file to write."
)
@source_option("The dataset it was trained on, for reports.")
@set_option
@common_options()
def convert(
    checkpoint: Path,
    pairing: str,
    out: Path,
    source: str | None,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Convert a released CHECKPOINT (.pth of MFuser or tqdm) for evaluate and predict.

    The file contains its frozen encoders, so nothing else has to be downloaded. The kind of
    release is recognized from the keys, and every key is accounted for.
    """
    registry = common.registry()
    from mfuser.engine.convert import convert as convert_file

    account = convert_file(registry, checkpoint, pairing, out, settings=settings, source=source)
    if common.as_json:
        emit(account)
        return
    click.echo(f"{checkpoint}: {account['title']}, {account['keys']} tensors")
    click.echo(f"  {account['mapped']} taken over")
    for reason, keys in account["unused"].items():
        shown = ", ".join(keys[:2]) + (", …" if len(keys) > 2 else "")
        click.echo(f"  {len(keys)} unused: {reason} ({shown})")
    for name, reason in account["kept"].items():
        click.echo(f"  {name} as it starts: {reason}")
    if account["without_ids"]:
        click.echo(f"  no class texts yet: {account['without_ids']}")
    click.echo(f"written: {out} ({account['bytes'] / 1e9:.2f} GB)")
