"""The frozen dictionary of the components that plugins offer, and validation by their specs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mfuser.errors import PluginError, RegistryError, suggest
from mfuser.specs import KINDS, Spec

NARROW = "MFUSER_PLUGINS"
"""Environment variable: the installed plugins to load ("timm,linear") or to leave out ("-mine").
Unset: all; empty: none. What is asked for by --plugin or [plugins] is always loaded."""


@dataclass(frozen=True)
class Component:
    """A spec class and the plugin that offers it."""

    kind: str
    name: str
    spec: type[Spec]
    plugin: str


@dataclass(frozen=True)
class LoadedPlugin:
    """seconds: of its import and its hook. changed: what of the process was put back after it.
    installed: the word that `MFUSER_PLUGINS` knows it by; None for one that was asked for."""

    plugin: str
    seconds: float
    changed: tuple[str, ...] = ()
    installed: str | None = None


@dataclass(frozen=True)
class BrokenPlugin:
    plugin: str
    cause: str


@dataclass(frozen=True)
class Clash:
    """Two components of one kind and name; only the first is used."""

    kept: Component
    left_out: Component


class Components:
    """Everything that is installed, by kind and name. Never changes once made."""

    def __init__(
        self,
        found: Iterable[Component],
        broken: Sequence[BrokenPlugin] = (),
        loaded: Sequence[LoadedPlugin] = (),
        prefer: str | None = None,
    ) -> None:
        """prefer: the plugin whose components win where a name is taken, as while it is checked.

        Raises PluginError for any other two components of one kind and name.
        """
        self.broken = tuple(broken)
        self.loaded = tuple(loaded)
        self.clashes: list[Clash] = []
        self._by_kind: dict[str, dict[str, Component]] = {kind: {} for kind in KINDS}
        for component in found:
            known = self._by_kind[component.kind]
            if (other := known.get(component.name)) is not None:
                if prefer is None or prefer not in (other.plugin, component.plugin):
                    raise PluginError(self._clash(other, component))
                if other.plugin == prefer:
                    self.clashes.append(Clash(other, component))
                    continue
                self.clashes.append(Clash(component, other))
            known[component.name] = component

    def _clash(self, one: Component, other: Component) -> str:
        """Both, and a way out that works."""
        if one.plugin == other.plugin:
            return (
                f"plugin '{one.plugin}' offers two {one.kind} components named '{one.name}'; "
                "rename one"
            )
        words = {p.plugin: p.installed for p in self.loaded}
        installed = [words[p] for p in (other.plugin, one.plugin) if words.get(p)]
        given = os.environ.get(NARROW)
        ways = [
            f"leave '{p}' out of --plugin and [plugins]"
            for p in (one.plugin, other.plugin)
            if p in words and words[p] is None
        ]
        if installed:
            ways.append(f"set {NARROW}={f'{given},' if given else ''}-{installed[0]}")
        return (
            f"two plugins offer a {one.kind} component named '{one.name}': '{one.plugin}' and "
            f"'{other.plugin}'; rename one, or {' or '.join(ways) or 'uninstall one'}"
        )

    def __iter__(self) -> Iterator[Component]:
        return (c for kind in self._by_kind for c in self.kind(kind).values())

    def kind(self, kind: str) -> dict[str, Component]:
        """Name -> component of one kind."""
        if kind not in self._by_kind:
            raise RegistryError(f"no kind of component is called '{kind}'{suggest(kind, KINDS)}")
        return dict(sorted(self._by_kind[kind].items()))

    def validate(self, kinds: Sequence[str], value: Any) -> Spec:
        """A table such as {name = "linear", …}, or just "linear", -> its validated spec.

        Raises ValueError or pydantic's ValidationError, for a caller that knows file and key.
        """
        names = {name for kind in kinds for name in self._by_kind[kind]}
        what = " or ".join(kind.replace("_", "-") for kind in kinds)
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise ValueError(
                f"expected the name of a {what} component, or a table with a 'name', not "
                f"{value!r}{suggest('', names)}"
            )
        if "name" not in value:
            raise ValueError(f"the {what} component has no 'name'{suggest('', names)}")
        name = value["name"]
        if not isinstance(name, str):
            raise ValueError(f"'name' is the name of a {what} component, not {name!r}")
        for kind in kinds:
            if name in self._by_kind[kind]:
                spec = self._by_kind[kind][name].spec
                return spec.model_validate(value, context={"components": self})
        raise ValueError(f"no {what} component is called '{name}'{self._instead(name, names)}")

    def _instead(self, name: str, names: Iterable[str]) -> str:
        """Alternatives to a name that none of the wanted kinds has."""
        others = [k.replace("_", "-") for k, found in self._by_kind.items() if name in found]
        text = f"; it is a {others[0]} component{suggest('', names)}" if others else ""
        text = text or suggest(name, names)
        broken = ", ".join(b.plugin for b in self.broken)
        return text + (f" (plugins that failed to load: {broken})" if broken else "")
