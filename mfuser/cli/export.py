"""The command that takes a model out of here."""

from __future__ import annotations

from pathlib import Path

import click

from mfuser.cli import cli, emit
from mfuser.cli.options import (
    Common,
    common_options,
    set_option,
    weights_option,
)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(["torch", "onnx"]), default="onnx",
              show_default=True, help="torch: a torch.export program (.pt2).")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=None,
              help="Default: model.onnx or model.pt2 in RUN.")  # fmt: skip
@weights_option
@set_option
@common_options()
def export(
    run: Path,
    format_: str,
    out: Path | None,
    weights: str | None,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Write the model of RUN as a program of standard operators, and compare it with the model.

    RUN is a run folder or a checkpoint. The program takes windows of the pairing's image size, RGB
    in [0, 1], any number at once, and returns class scores; the class texts are part of it.
    """
    registry = common.registry()
    from mfuser.engine.checkpoints import load_model
    from mfuser.engine.export import ENDINGS
    from mfuser.engine.export import export as export_model

    model, _ = load_model(run, registry, list(settings), weights)
    if out is None:
        out = (run if run.is_dir() else run.parent) / f"model{ENDINGS[format_]}"
    written = export_model(model, out, format_)  # type: ignore[arg-type]
    if common.as_json:
        emit(written.as_dict())
        return
    height, width = written.window
    click.echo(f"written: {written.path} ({written.bytes / 1e6:.1f} MB)")
    click.echo(
        f"  takes images (batch, 3, {height}, {width}), RGB in [0, 1]; "
        f"returns scores (batch, {len(written.classes)}, {height}, {width})"
    )
    click.echo(
        f"  against the model, on random images: largest difference {written.difference:.1e} of "
        f"the largest score, {written.agreement:.2%} of the pixels in the same class"
    )
