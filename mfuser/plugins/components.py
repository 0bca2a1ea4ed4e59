"""The frozen dictionary of the components that plugins offer, and the unions that validate them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from pydantic import Field, TypeAdapter

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
class BrokenPlugin:
    plugin: str
    cause: str


class Components:
    """Everything that is installed, by kind and name. Never changes once made."""

    def __init__(self, found: Iterable[Component], broken: Sequence[BrokenPlugin] = ()) -> None:
        self.broken = tuple(broken)
        self._by_kind: dict[str, dict[str, Component]] = {kind: {} for kind in KINDS}
        for component in found:
            known = self._by_kind[component.kind]
            if (other := known.get(component.name)) is not None:
                raise PluginError(
                    f"two plugins offer a {component.kind} component named '{component.name}': "
                    f"'{other.plugin}' and '{component.plugin}'; rename one, uninstall one, or "
                    f"leave one out: {NARROW}=-{component.plugin}"
                )
            known[component.name] = component
        self._unions: dict[str, TypeAdapter[Any]] = {}

    def __iter__(self) -> Iterator[Component]:
        return (c for kind in self._by_kind for c in self.kind(kind).values())

    def kind(self, kind: str) -> dict[str, Component]:
        """Name -> component of one kind."""
        if kind not in self._by_kind:
            raise RegistryError(f"no kind of component is called '{kind}'{suggest(kind, KINDS)}")
        return dict(sorted(self._by_kind[kind].items()))

    def union(self, kind: str) -> TypeAdapter[Any]:
        """The pydantic union of a kind's specs, told apart by `name`."""
        if kind not in self._unions:
            specs = tuple(c.spec for c in self._by_kind[kind].values())
            # A union of one is its member, which takes no discriminator.
            union: Any = (
                specs[0]
                if len(specs) == 1
                else Annotated[Union[specs], Field(discriminator="name")]  # noqa: UP007
            )
            self._unions[kind] = TypeAdapter(union)
        return self._unions[kind]

    def validate(self, kinds: Sequence[str], value: Any) -> Spec:
        """A table such as {name = "linear", …}, or just "linear", -> its validated spec.

        Raises ValueError or pydantic's ValidationError, for a caller that knows file and key.
        """
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise ValueError(f"expected a table with a 'name' or a name, not {value!r}")
        names = {name for kind in kinds for name in self._by_kind[kind]}
        name = value.get("name")
        if not isinstance(name, str | None):
            raise ValueError(f"'name' is the name of a component, not {name!r}")
        what = " or ".join(kind.replace("_", "-") for kind in kinds)
        if name is None:
            raise ValueError(f"the {what} component has no 'name'{suggest('', names)}")
        for kind in kinds:
            if name in self._by_kind[kind]:
                spec = self.union(kind).validate_python(value, context={"components": self})
                assert isinstance(spec, Spec)
                return spec
        raise ValueError(
            f"no {what} component is called '{name}'{suggest(str(name), names)}"
            + (
                f" (plugins that failed to load: {', '.join(b.plugin for b in self.broken)})"
                if self.broken
                else ""
            )
        )
