"""Finding plugins, and the frozen dictionary of the components they offer."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Union

import pluggy
from pydantic import Field, TypeAdapter

from mfuser import hookspecs
from mfuser.errors import PluginError, RegistryError, suggest
from mfuser.specs import KINDS, Spec

GROUP = "mfuser"
"""The entry-point group of installed plugins."""


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
                    f"'{other.plugin}' and '{component.plugin}'; rename one, or uninstall one"
                )
            known[component.name] = component
        self._unions: dict[str, TypeAdapter[Any]] = {}

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


def load_components(requested: Sequence[str] = ()) -> Components:
    """Everything that entry points offer, and what `requested` (modules or .py files) offers.

    An installed plugin that fails is recorded in `broken` and the others go on working; one
    asked for by name is an error.
    """
    broken: list[BrokenPlugin] = []
    manager = pluggy.PluginManager("mfuser")
    manager.add_hookspecs(hookspecs)
    for entry in sorted(set(metadata.entry_points(group=GROUP)), key=lambda e: e.name):
        label = f"{entry.name} ({entry.value})"
        _register(manager, entry.name, label, entry.load, broken)
    for name in requested:
        _register(manager, name, name, functools.partial(_import, name), None)
    found: list[Component] = []
    for name, plugin in manager.list_name_plugin():
        if plugin is not None:
            installed = not any(name == r for r in requested)
            found += _offered(name, manager, plugin, broken if installed else None)
    return Components(found, broken)


@functools.cache
def installed_components() -> Components:
    """What is installed, found once per process."""
    return load_components()


def components(kind: str) -> dict[str, type[Spec]]:
    """Name -> spec class of the installed components of a kind (`mfuser.KINDS`)."""
    return {name: c.spec for name, c in installed_components().kind(kind).items()}


def _register(
    manager: pluggy.PluginManager,
    name: str,
    label: str,
    load: Callable[[], Any],
    broken: list[BrokenPlugin] | None,
) -> None:
    """Load one plugin and check its hooks; `broken` None: a failure is an error."""
    try:
        plugin = load()
        if manager.is_registered(plugin) or manager.has_plugin(name):
            return
        manager.register(plugin, name)
        try:
            _check_hooks(manager, plugin)
        except Exception:
            manager.unregister(plugin)
            raise
    except (Exception, SystemExit) as error:
        if isinstance(error, PluginError):
            cause = str(error)
        elif isinstance(error, pluggy.PluginValidationError):
            cause = " ".join(str(error).split())
        else:
            cause = f"{type(error).__name__}: {error}"
        if broken is None:
            raise PluginError(f"plugin '{label}' cannot be used: {cause}") from error
        broken.append(BrokenPlugin(label, cause))


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    manager.check_pending()  # an implementation of a hook that does not exist
    if manager.get_hookcallers(plugin):
        return
    known = [n for n in vars(hookspecs) if n.startswith("mfuser_")]
    near = [n for n in dir(plugin) if n.startswith("mfuser")]
    hint = f"; it defines {', '.join(near)}, unmarked" if near else ""
    raise PluginError(f"it has no hook marked with @hookimpl{hint} (hooks: {', '.join(known)})")


def _offered(
    name: str, manager: pluggy.PluginManager, plugin: Any, broken: list[BrokenPlugin] | None
) -> list[Component]:
    """Call the plugin's hook, once, and check what it returns."""
    try:
        specs = manager.subset_hook_caller(
            "mfuser_components",
            [p for p in manager.get_plugins() if p is not plugin],
        )()
        result = []
        for spec in (s for group in specs for s in group):
            if not (isinstance(spec, type) and issubclass(spec, Spec) and spec.kind in KINDS):
                raise PluginError(
                    f"mfuser_components returned {spec!r}, which is not a spec class: subclass "
                    + ", ".join(base.__name__ for base in KINDS.values())
                )
            if "name" not in spec.model_fields or not isinstance(spec.component(), str):
                raise PluginError(f"spec '{spec.__name__}' has no name")
            if getattr(spec, "build") is getattr(KINDS[spec.kind], "build"):  # noqa: B009
                raise PluginError(f"spec '{spec.__name__}' does not define build()")
            result.append(Component(spec.kind, spec.component(), spec, name))
        return result
    except Exception as error:
        cause = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        if broken is None:
            raise PluginError(f"plugin '{name}' cannot be used: {cause}") from error
        broken.append(BrokenPlugin(name, cause))
        return []


def _import(name: str) -> ModuleType:
    """A plugin by module name or by path to a .py file."""
    path = Path(name)
    if path.suffix != ".py":
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and name.split(".")[0] == error.name.split(".")[0]:
                raise PluginError(
                    f"there is no module '{name}' (give a module that can be imported, or the "
                    "path of a .py file)"
                ) from error
            raise
    if not path.is_file():
        raise PluginError(f"there is no file {path}")
    module_name = f"mfuser_plugin_{path.stem}"
    known = sys.modules.get(module_name)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
