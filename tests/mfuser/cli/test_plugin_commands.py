"""Commands that plugins bring through the entry-point group mfuser.commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import click
import pytest

from mfuser import cli as command_line


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Commands as if they were installed, by name."""
    module = ModuleType("a_strangers_module")
    monkeypatch.setitem(sys.modules, "a_strangers_module", module)
    found = metadata.entry_points

    def bring(**objects: Any) -> None:
        for name, value in objects.items():
            setattr(module, name, value)
        group = command_line.COMMANDS
        entries = metadata.EntryPoints(
            metadata.EntryPoint(n, f"a_strangers_module:{n}", group)
            for n in (*objects, "absent") if n
        )  # fmt: skip

        def entry_points(**query: str) -> Any:
            if query.get("group") != group:
                return found(**query)
            return entries.select(**query)

        monkeypatch.setattr(command_line.metadata, "entry_points", entry_points)

    return bring


@click.command()
def greet() -> None:
    """Say hello."""
    click.echo("hello")


def test_a_command_of_a_plugin(brought: Callable[..., None], mfuser: Callable) -> None:
    brought(greet=greet)
    assert mfuser("greet").out == "hello\n"
    assert "did you mean 'greet'" in mfuser("gret").err


def test_what_cannot_be_loaded_is_named_and_alone(
    brought: Callable[..., None], mfuser: Callable
) -> None:
    brought(greet=greet, thing=3)
    absent = mfuser("absent")
    assert absent.code == 2
    assert "command 'absent' of a plugin: a_strangers_module:absent cannot be loaded" in absent.err
    assert mfuser("absent", "--some", "thing").err == absent.err
    assert "is not a click command" in mfuser("thing").err
    assert mfuser("greet").code == 0
    assert mfuser("list", "recipes", "--json").code == 0


def test_help_survives_a_broken_one(brought: Callable[..., None], mfuser: Callable) -> None:
    brought(greet=greet)
    shown = mfuser("--help")
    assert shown.code == 0 and "Say hello." in shown.out and "train" in shown.out


def test_our_commands_cannot_be_replaced(brought: Callable[..., None], mfuser: Callable) -> None:
    brought(train=greet)
    assert "Train PAIRING on a source" in mfuser("train", "--help").out
