"""Options that several commands share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mfuser.config.registry import Registry

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class Resumable(click.Command):
    """A command with --resume: what follows it is its value only if that is "auto"."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        after = [*args[1:], ""]
        given = [
            "--resume=yes" if arg == "--resume" and after[k] != "auto" else arg
            for k, arg in enumerate(args)
        ]
        return super().parse_args(ctx, given)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
data_options = click.option(
    "--data-root",
    "data_roots",
    multiple=True,
    metavar="[NAME=]FOLDER",
    help="The folder of a dataset, or the one that holds them all by name.",
)

device_option = click.option(
    "--device",
    metavar="cpu|cuda|mps",
    type=click.Choice(["cpu", "cuda", "mps"]),
    default=None,
    help="Default: cuda where there is a GPU.",
)


@dataclass(frozen=True)
class Common:
    """The options of `common_options`, as they were given."""

    registries: tuple[str, ...]
    plugins: tuple[str, ...]
    data_roots: tuple[str, ...] = ()
    device: str | None = None
    as_json: bool = False

    def registry(self) -> Registry:
        """The registry of --registry, --plugin and --data-root."""
        with _importing():
            from mfuser.config.registry import load_registry

            return load_registry(*self.registries, plugins=self.plugins, data_roots=self.data_roots)

    def check_device(self) -> str | None:
        """The device. Raises UsageError where a GPU is asked for and there is none."""
        if self.device in ("cuda", "mps"):
            import torch

            there = torch.cuda if self.device == "cuda" else torch.backends.mps
            if not there.is_available():
                gpu = "GPU" if self.device == "cuda" else "GPU of Apple's"
                raise click.UsageError(
                    f"--device {self.device}: torch sees no {gpu} here; leave the option out"
                )
        return self.device


def common_options(*, data: bool = False, device: bool = False, json: bool = True) -> Decorator:
    """--registry and --plugin, and of --data-root, --device and --json those asked for.

    The command takes them all as `common`.
    """
    options = [
        click.option(
            "--registry",
            "registries",
            multiple=True,
            metavar="FILE",
            help="A registry file on top of the shipped one, instead of ./registry.toml.",
        ),
        click.option(
            "--plugin",
            "plugins",
            multiple=True,
            metavar="MODULE|FILE.py",
            help="Load a plugin that is not installed.",
        ),
    ]
    options += [data_options] if data else []
    options += [device_option] if device else []
    options += [json_option] if json else []

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def run(*arguments: Any, **given: Any) -> Any:
            names = [f.name for f in dataclasses.fields(Common) if f.name in given]
            common = Common(**{name: given.pop(name) for name in names})
            return command(*arguments, common=common, **given)

        for option in reversed(options):
            run = option(run)
        return run

    return add


precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "no", "bf16", "fp16"]),
    default="auto",
    help="Of matrix products; no: float32. Default: on a GPU the training's, on a CPU float32.",
)
weights_option = click.option(
    "--weights",
    type=click.Choice(["last", "averaged", "best"]),
    default=None,
    help="Which of the run's. Default: its recipe's, else averaged ones (ema), else the last.",
)
compile_option = click.option(
    "--compile",
    is_flag=True,
    help="Compile the model by torch.compile; its options by --set compile.KEY=VALUE.",
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change an option of the pairing, e.g. fusion.state_size=8.",
)
resume_option = click.option(
    "--resume",
    type=click.Choice(["yes", "auto"]),
    is_flag=False,
    flag_value="yes",
    metavar="[auto]",
    default=None,
    help="Continue the run in --out; auto: if there is one, else begin it.",
)
stride_option = click.option(
    "--stride",
    type=click.IntRange(min=1),
    default=None,
    callback=lambda context, option, pixels: None if pixels is None else (pixels, pixels),
    help="Stride of the sliding window, in pixels. Default: the recipe's, or 2/3 of the window.",
)
set_recipe_option = click.option(
    "--set-recipe",
    "recipe_settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change an option of the recipe, e.g. lr=3e-4.",
)


workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=None,
    metavar="N",
    help="Threads that read ahead while the device computes. Default: 1 on two cores, at most 4.",
)


def _window_batch(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or not int(text):
        raise click.UsageError(f"--window-batch takes a positive integer or auto, not {text}")
    return int(text)


window_batch_option = click.option(
    "--window-batch",
    default=None,
    metavar="N|auto",
    callback=_window_batch,
    help="Windows that go through the model at once; auto: as many as a GPU has memory for, "
    "on a CPU one, or a few small ones. Default: the recipe's, or auto.",
)


def inference_options(command: Command) -> Command:
    """--inference, --stride and --window-batch."""
    for option in (
        window_batch_option,
        stride_option,
        click.option(
            "--inference",
            default=None,
            metavar="NAME",
            help="How images are segmented (mfuser list inference); its options by --set "
            "inference.KEY=VALUE. Default: the recipe's, or sliding.",
        ),
    ):
        command = option(command)
    return command


# What these stand for, and what holds without them, each command says itself.


def recipe_option(help: str) -> Decorator:
    return click.option("--recipe", default=None, metavar="NAME", help=help)


def source_option(help: str) -> Decorator:
    return click.option("--source", default=None, metavar="DATASET", help=help)


def targets_option(help: str) -> Decorator:
    return click.option("--targets", default=None, metavar="A,B,…", help=help)


def out_option(help: str) -> Decorator:
    return click.option("--out", type=click.Path(path_type=Path), default=None, help=help)


def scale_option(default: str) -> Decorator:
    return click.option(
        "--scale",
        default=default,
        show_default=True,
        metavar="FACTOR|auto|fit",
        callback=_factor,
        help="Resize images first; auto: enlarge those smaller than the window; fit: until they "
        "just cover it.",
    )


def _factor(context: click.Context, option: click.Parameter, text: str) -> float | str:
    if text in ("auto", "fit"):
        return text
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0.01 <= factor <= 100:
        raise click.UsageError(f"--scale takes a factor from 0.01 to 100, auto or fit, not {text}")
    return factor


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """The imports of torch and the plugins, without the garbage collector.

    What they create stays to the end of the process; walking it again and again, and once more at
    the exit, takes a fifth of the time of `mfuser list`.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
