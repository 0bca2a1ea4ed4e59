"""Which package each component of a pairing came with, so that a file can say what it needs."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

from pydantic import BaseModel

from mfuser.plugins.components import Components
from mfuser.plugins.discovery import GROUP
from mfuser.specs import KINDS, Spec


def origins(value: Any) -> list[dict[str, str]]:
    """The components in a table of options that came with another package than this one: kind,
    name, package."""
    if isinstance(value, list | tuple):
        return [origin for item in value for origin in origins(item)]
    if not isinstance(value, BaseModel):
        return []
    found = [o for field in type(value).model_fields for o in origins(getattr(value, field))]
    package = _packages().get(type(value).__module__.split(".")[0])
    if isinstance(value, Spec) and package is not None and package.split()[0] != "mfuser":
        found.append({"kind": value.kind, "name": value.component(), "package": package})
    return found


def missing(known: Components, needed: Any) -> str:
    """ " (fusion 'swap' comes with the package 'mfuser-swap 0.1')" for what `origins` once found
    and is not here. Of a file, so of any shape."""
    for origin in needed if isinstance(needed, list) else ():
        kind, name, package = (str(origin.get(k)) for k in ("kind", "name", "package"))
        if kind in KINDS and name not in known.kind(kind):
            what = f"{kind.replace('_', '-')} '{name}'"
            return f" ({what} comes with the package '{package}', which is not installed here)"
    return ""


@functools.lru_cache(maxsize=1)
def _packages() -> dict[str, str]:
    """Top-level module of an installed plugin -> "package version"."""
    entries = metadata.entry_points(group=GROUP)
    return {
        e.value.split(".")[0].split(":")[0]: f"{e.dist.name} {e.dist.version}"
        for e in entries
        if e.dist is not None
    }
