"""The command that shows a model in a browser."""

from __future__ import annotations

import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfuser.cli import cli
from mfuser.cli.options import (
    Common,
    common_options,
    inference_options,
    set_option,
    weights_option,
)

if TYPE_CHECKING:
    from mfuser.model.window_batch import WindowBatch


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True,
              help="0: any that is free.")  # fmt: skip
@click.option("--open", "open_", is_flag=True, help="Open the page in the default browser.")
@click.option("--longest-side", type=click.IntRange(min=64), default=None,
              help="Shrink larger photographs to so many pixels. Default: 2048.")  # fmt: skip
@inference_options
@weights_option
@set_option
@common_options(device=True, json=False)
def serve(
    run: Path,
    port: int,
    open_: bool,
    longest_side: int | None,
    inference: str | None,
    stride: tuple[int, int] | None,
    window_batch: WindowBatch | None,
    weights: str | None,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Show the model of RUN on a page of this machine: drop a photograph, see its mask.

    Also its confidence, and where the photograph is like any words. Nobody but this machine is
    served. Ctrl-C ends it.
    """
    registry = common.registry()
    device = common.check_device()
    import torch

    from mfuser.engine.app import check_gradio, serving
    from mfuser.engine.checkpoints import load_model
    from mfuser.engine.inference import of_record, split
    from mfuser.engine.precision import Precision
    from mfuser.engine.viewer import LONGEST, Viewer
    from mfuser.reporting.adapter_cost import default_device

    check_gradio()
    own, others = split(settings)
    model, checkpoint = load_model(run, registry, others, weights)
    record = checkpoint.meta["run"]
    windows: Any = {"stride": stride, "window_batch": window_batch}
    asked_for = of_record(registry, record, str(run), name=inference, settings=own, **windows)
    name = str(record.get("pairing_name") or run.resolve().name)
    where = torch.device(device or default_device())
    how = Precision.of_inference(where, record)  # as predict does
    shown_by = how.around(asked_for.build())
    viewer = Viewer(how.prepare(model), name, where, shown_by, longest_side or LONGEST)
    with serving(viewer, port) as address:
        click.echo(f"{name}: {address} (Ctrl-C ends it)")
        if open_:
            webbrowser.open(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            click.echo("stopped")
