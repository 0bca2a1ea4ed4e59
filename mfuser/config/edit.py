"""Adding tables to a registry file without touching what is written there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from mfuser.errors import RegistryError
from mfuser.files import write_text

BARE = re.compile(r"[A-Za-z0-9_-]+")


def add_tables(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Append [a.b] tables to a registry file, new or not; returns the text that was added.

    tables: dotted name -> keys. A [data] table that is there takes the new keys. Raises
    RegistryError where a table of that name exists, or the file is not valid TOML.
    """
    before = path.read_text("utf-8-sig") if path.is_file() else ""
    try:
        known = tomllib.loads(before)
    except tomllib.TOMLDecodeError as error:
        raise RegistryError(f"{path} is not valid TOML: {error}") from error
    added, after = [], before.rstrip("\n")
    for name, keys in tables.items():
        there: Any = known
        for part in name.split("."):
            there = there.get(part, {}) if isinstance(there, dict) else {}
        if there and (name != "data" or set(there) & set(keys)):
            key = f" {next(iter(set(there) & set(keys)))}" if name == "data" else ""
            raise RegistryError(
                f"{path} has [{name}]{key} already; choose another --name, or remove it there"
            )
        lines = [f"{_key(key)} = {toml_value(value)}" for key, value in keys.items()]
        added.append("\n".join([f"[{name}]", *lines]))
        head = re.search(r"^\[data\][ \t]*(#.*)?$", after, re.M) if name == "data" else None
        if head:
            after = after[: head.end()] + "\n" + "\n".join(lines) + after[head.end() :]
        else:
            after += ("\n\n" if after else "") + added[-1]
    try:
        tomllib.loads(after)
    except tomllib.TOMLDecodeError as error:
        raise RegistryError(f"{path} cannot take new tables: {error}; add them by hand") from error
    write_text(path, after + "\n")
    return "\n\n".join(added)


def toml_value(value: Any) -> str:
    """A value as TOML on one line: strings, numbers, booleans, lists and tables of them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a basic TOML string
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    return "[" + ", ".join(toml_value(v) for v in value) + "]"


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)
