"""Tables as they are written: read from TOML, laid over each other, found again by line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfuser.errors import RegistryError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]
Keys = tuple[str, ...]
"""The path of a key: ("pairing", "mine", "fusion", "state_size")."""


def read(path: Path) -> tuple[str, Table]:
    """A TOML file -> its name and its document. Raises RegistryError naming file and line."""
    try:
        return str(path), tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise RegistryError(f"there is no registry file {path}") from error
    except UnicodeDecodeError as error:
        raise RegistryError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as such"
        ) from error
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise RegistryError(f"{path} is not valid TOML: {error}") from error


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Table:
    """`above` on `below`: tables merge key by key, unless the upper one names its component.

    A table of numbers on a list, {"1": …}, changes single items of it, counted from 1.
    """
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, str) and isinstance(value, dict) and "name" not in value:
            under = {"name": under}  # "linear" is short for {name = "linear"}
        if isinstance(under, dict) and isinstance(value, dict) and "name" not in value:
            merged[key] = merge(under, value)
        elif isinstance(under, list | tuple) and isinstance(value, dict) and "name" not in value:
            merged[key] = _in_list(key, under, value)
        else:
            merged[key] = value
    return merged


def _in_list(key: str, under: Sequence[Any], above: Mapping[str, Any]) -> list[Any]:
    items = {str(i): item for i, item in enumerate(under, 1)}
    for number in above:
        if number not in items:
            raise RegistryError(
                f"{key}.{number}: '{key}' is a list, whose items are {key}.1 to {key}.{len(items)}"
            )
    return list(merge(items, above).values())


def parse_settings(settings: Sequence[str]) -> Table:
    """["fusion.state_size=8", "decoder=linear"] -> a table; values are TOML, or bare strings."""
    table: Table = {}
    for setting in settings:
        key, sep, text = setting.partition("=")
        parts = key.strip().split(".")
        if not sep or not all(parts):
            raise RegistryError(f"--set {setting}: write key=value, e.g. fusion.state_size=8")
        nested: Table = {parts[-1]: _value(text.strip())}
        for part in reversed(parts[:-1]):
            nested = {part: nested}
        table = merge(table, nested)
    return table


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def flat(table: Any) -> Any:
    """{"fusion": {"every": […]}} is {"fusion.every": […]}; the last of two that agree counts."""
    if not isinstance(table, dict):
        return table
    found: Table = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": v for inner, v in flat(value).items()}
        else:
            found[key] = value
    return found


def paths(table: Mapping[str, Any], prefix: Keys = ()) -> list[Keys]:
    """The path of every key of a table, parents before children."""
    found: list[Keys] = []
    for key, value in table.items():
        path = (*prefix, str(key))
        found.append(path)
        if isinstance(value, Mapping):
            found += paths(value, path)
    return found


def values(table: Mapping[str, Any], prefix: Keys = ()) -> list[Keys]:
    """The paths at which `merge` replaces what is below: options, and tables that name their
    component."""
    found: list[Keys] = []
    for key, value in table.items():
        path = (*prefix, str(key))
        merges = isinstance(value, Mapping) and "name" not in value
        found += values(value, path) if merges else [path]
    return found


def located(file: str, path: Keys) -> str:
    """ "registry.toml:12", the line that sets a key or, failing that, begins its table; the file's
    name alone where it cannot be told."""
    lines = _lines(file)
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return f"{file}:{lines[path[:end]]}"
    return file


@functools.cache
def _lines(file: str) -> dict[Keys, int]:
    """The line (from 1) of every key of a TOML file; {} if it is not there (any more)."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return {}
    found: dict[Keys, int] = {}
    table: Keys = ()
    statement, begun = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        begun = begun if statement else number
        statement += line + "\n"
        try:
            # A statement ends where the parser first takes it: arrays and texts may be longer.
            keys = paths(tomllib.loads(statement))
        except tomllib.TOMLDecodeError:
            continue
        header = statement.lstrip().startswith("[")
        for key in keys:
            found.setdefault(key if header else (*table, *key), begun)
        table = keys[-1] if header else table
        statement = ""
    return found
