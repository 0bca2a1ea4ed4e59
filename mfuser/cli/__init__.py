"""The command line. torch is imported by the commands that need it, when they run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any, TextIO

import click

from mfuser.engine.signals import INTERRUPTED as INTERRUPTED
from mfuser.engine.signals import REQUEUE, Ended, ending, named
from mfuser.errors import (
    ElsewhereError,
    MFuserError,
    PluginError,
    PluginWarning,
    out_of_memory,
    suggest,
)
from mfuser.version import __version__

GOES_ON = ("train", "evaluate", "ablate")
"""Commands that a scheduler starts, and starts again: its signals end them with REQUEUE."""


class Group(click.Group):
    """A group that names the nearest command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(
                f"there is no command '{name}'{suggest(name, self.list_commands(ctx))}", ctx
            )
        return super().resolve_command(ctx, args)


COMMANDS = "mfuser.commands"
"""The entry-point group of commands that plugins bring: name = "module:click command"."""


class Root(Group):
    """The commands of the framework, and those that plugins bring."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *metadata.entry_points(group=COMMANDS).names})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A plugin's command that cannot be loaded says so where it is listed or run."""
        if found := super().get_command(ctx, name):
            return found
        for entry in metadata.entry_points(group=COMMANDS, name=name):
            try:
                command = entry.load()
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                return _broken(name, f"{entry.value} cannot be loaded: {why}")
            if isinstance(command, click.Command):
                return command
            return _broken(name, f"{entry.value} is not a click command")
        return None


def _broken(name: str, why: str) -> click.Command:
    """In the place of a plugin's command: raises PluginError whatever its arguments."""

    def fail() -> None:
        raise PluginError(f"the command '{name}' of a plugin: {why}")

    lenient = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    return click.Command(name, context_settings=lenient, callback=fail, help=why)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mfuser")
def cli() -> None:
    """Domain-generalized semantic segmentation with any pair of foundation models.

    Pairings, recipes and datasets are declared in registry.toml; `mfuser list` shows them.
    """


_results: TextIO | None = None
"""Standard output while --json keeps everything else away from it."""


def emit(value: Any) -> None:
    """Print a result as JSON on standard output."""
    click.echo(json.dumps(value, indent=1), file=_results)


@contextlib.contextmanager
def _results_alone(arguments: list[str]) -> Iterator[None]:
    """With --json, whatever plugins and libraries print goes to standard error."""
    global _results
    if "--json" not in arguments:
        yield
        return
    _results = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings about plugins as sentences, all others as Python shows them."""
    if issubclass(category, PluginWarning):
        print(f"mfuser: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def main(argv: list[str] | None = None) -> None:
    """Run a command; what a user got wrong ends in one sentence and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        arguments = ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 gets "?" for "×"
            stream.reconfigure(errors="replace")
    with _results_alone(arguments), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        with ending() if arguments[0] in GOES_ON else contextlib.nullcontext():
            _run(arguments)


def _run(arguments: list[str]) -> None:
    try:
        code = cli.main(arguments, prog_name="mfuser", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        end = stop if isinstance(stop, Ended) else stop.__cause__  # click makes an Abort of both
        if isinstance(end, Ended):
            print(f"mfuser: ended by {named(end.number)}; start it again to go on", file=sys.stderr)
            sys.exit(REQUEUE)
        print("mfuser: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except click.NoSuchOption as error:
        near, path = "", "mfuser"
        if error.ctx is not None:
            path = error.ctx.command_path
            near = suggest(error.option_name, [o for p in error.ctx.command.params for o in p.opts])
        _fail(f"there is no option '{error.option_name}'{near} (see: {path} --help)", arguments)
    except click.ClickException as error:
        where = f" (see: {error.ctx.command_path} --help)" if getattr(error, "ctx", None) else ""  # type: ignore[attr-defined]
        _fail(error.format_message().rstrip(".") + where, arguments)
    except ElsewhereError as error:  # that process says why
        sys.exit(error.exit_code)
    except MFuserError as error:
        _fail(str(error), arguments, error.exit_code)
    except BrokenPipeError:
        # Whoever read the output has gone; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), (_results or sys.stdout).fileno())
        sys.exit(1)
    except OSError as error:
        if os.environ.get("MFUSER_DEBUG"):
            raise
        _fail(str(error), arguments)
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("MFUSER_DEBUG") or not out_of_memory(error):
            raise
        _fail("out of memory; lower batch_size or image_size, or use a smaller model", arguments)


def _fail(message: str, arguments: list[str], code: int = 2) -> None:
    message = " ".join(message.split())
    if "--json" in arguments:
        emit({"error": message})
    print(f"mfuser: {message}", file=sys.stderr)
    sys.exit(code)


from mfuser.cli import (  # noqa: E402, F401  (they add their commands)
    ablate,
    bench,
    convert,
    data,
    export,
    hub,
    plugin,
    serve,
    show,
    visualize,
    work,
)
