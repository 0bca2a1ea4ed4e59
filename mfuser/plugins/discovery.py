"""Finding plugins, and the frozen dictionary of the components they offer.

A plugin is a stranger's code. If it fails or changes the process, it is named, and the others go on
working.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from mfuser import hookspecs
from mfuser.errors import PluginError, PluginWarning, suggest
from mfuser.plugins.blame import raised_in
from mfuser.plugins.components import NARROW, BrokenPlugin, Component, Components, LoadedPlugin
from mfuser.specs import KINDS, Spec, offer_installed
from mfuser.specs import component_of as component_of
from mfuser.version import __version__

GROUP = "mfuser"
"""The entry-point group of installed plugins."""

REQUIRES = "mfuser_requires"
"""Attribute of a plugin's module: the versions of mfuser it works with, ">=0.1,<0.2"."""


class _Loader:
    """Plugins on their way into a pluggy manager: each timed, contained, and reported."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("mfuser")
        self.manager.add_hookspecs(hookspecs)
        self.found: list[Component] = []
        self.loaded: list[LoadedPlugin] = []
        self.broken: list[BrokenPlugin] = []

    def add(
        self, name: str, label: str, load: Callable[[], Any], package: str, installed: str | None
    ) -> None:
        """Import a plugin and ask it for its components.

        package: its top-level module. installed: the word that leaves it out; None for one that
        was asked for, whose failure is an error.
        """
        from mfuser.plugins.containment import contained

        start = time.perf_counter()
        try:
            with contained() as changed:
                plugin = load()
                if self.manager.is_registered(plugin):
                    return
                _declared(plugin)
                found = self._components(plugin, name)
        except (Exception, SystemExit) as error:
            cause = _cause(error, package)
            if installed is None:
                raise PluginError(f"plugin '{label}' cannot be used: {cause}", label) from error
            self.broken.append(BrokenPlugin(label, cause))
            return
        seconds = time.perf_counter() - start
        self.found += found
        self.loaded.append(LoadedPlugin(name, seconds, tuple(changed), installed))
        if changed:
            warnings.warn(
                f"plugin '{name}' changed {', '.join(changed)} as it was imported; it was put back",
                PluginWarning,
                stacklevel=2,
            )

    def request(self, names: Sequence[str]) -> None:
        """Add plugins that were asked for: modules or .py files."""
        if names:
            importlib.import_module("mfuser.interfaces")
        for name in names:
            self.add(name, name, functools.partial(_import, name), _package(name), None)

    def _components(self, plugin: Any, name: str) -> list[Component]:
        """Register a plugin, check its hooks, and call the one it has, once."""
        try:
            self.manager.register(plugin, name)
            _check_hooks(self.manager, plugin)
            others = [p for p in self.manager.get_plugins() if p is not plugin]
            specs = self.manager.subset_hook_caller("mfuser_components", others)()
            # pluggy leaves out a hook that returned None.
            return _checked(specs[0] if specs else None, name)
        except BaseException:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            raise


def load_components(requested: Sequence[str] = (), prefer: str | None = None) -> Components:
    """Everything that entry points offer, and what `requested` (modules or .py files) offers.

    An installed plugin that fails is recorded in `broken` and the others go on working; one
    asked for by name is an error. `MFUSER_PLUGINS` narrows what is installed. prefer: as in
    `Components`.
    """
    loader = _installed(_Loader())
    loader.request(requested)
    return Components(loader.found, loader.broken, loader.loaded, prefer)


def _installed(loader: _Loader) -> _Loader:
    entries = _narrowed(sorted(set(metadata.entry_points(group=GROUP)), key=_order))
    if entries:
        # Every plugin needs it: the seconds that torch takes are not to be counted as theirs.
        importlib.import_module("mfuser.interfaces")
    allowed = functools.cache(_allowed)  # all plugins of a distribution have its requirements
    for entry in entries:
        label = f"{entry.name} ({entry.value})"
        # Two distributions may give one name to different modules: both are loaded.
        twice = loader.manager.has_plugin(entry.name)
        loader.add(
            label if twice else entry.name,
            label,
            functools.partial(_load, entry, allowed),
            entry.value.split(".")[0],
            entry.value if twice else entry.name,
        )
    return loader


def _order(entry: metadata.EntryPoint) -> tuple[str, str]:
    return (entry.name, entry.value)


def _narrowed(entries: list[metadata.EntryPoint]) -> list[metadata.EntryPoint]:
    """The installed plugins that `MFUSER_PLUGINS` lets through."""
    given = os.environ.get(NARROW)
    if given is None:
        return entries
    words = [w.strip() for w in given.split(",") if w.strip()]
    dropped = {w[1:] for w in words if w.startswith("-")}
    kept = {w for w in words if not w.startswith("-")}
    names = {e.name for e in entries}
    for word in sorted((kept | dropped) - {e.value for e in entries}):
        if word not in names:
            raise PluginError(
                f"{NARROW}={given}: no installed plugin is called '{word}'{suggest(word, names)}"
            )
    # By name, or by module where two distributions give one name to different modules.
    return [
        e
        for e in entries
        if words and (not kept or kept & {e.name, e.value}) and not dropped & {e.name, e.value}
    ]


def _load(
    entry: metadata.EntryPoint, allowed: Callable[[metadata.Distribution], list[SpecifierSet]]
) -> Any:
    """An installed plugin, imported if its distribution allows this version of mfuser."""
    if entry.dist is not None:
        for versions in allowed(entry.dist):
            _check_version(versions, f"its package {entry.dist.name}")
    return entry.load()


def _allowed(package: metadata.Distribution) -> list[SpecifierSet]:
    """The versions of mfuser that a distribution requires."""
    found = []
    for text in package.requires or ():
        try:
            needed = Requirement(text)
        except InvalidRequirement:
            continue
        if needed.name.lower() == "mfuser" and (
            needed.marker is None or needed.marker.evaluate({"extra": ""})
        ):
            found.append(needed.specifier)
    return found


def _check_version(allowed: SpecifierSet, who: str) -> None:
    if not allowed.contains(__version__, prereleases=True):
        raise PluginError(
            f"{who} works with mfuser {allowed}, and this is {__version__}; install another "
            "version of one of the two"
        )


def _declared(plugin: Any) -> None:
    """Hold a plugin to its own `mfuser_requires`."""
    given = getattr(plugin, REQUIRES, None)
    if given is None:
        return
    try:
        allowed = SpecifierSet(given)
    except (InvalidSpecifier, TypeError, AttributeError) as error:
        raise PluginError(
            f'{REQUIRES} = {given!r} is not a version specifier; write e.g. ">=0.1,<0.2"'
        ) from error
    _check_version(allowed, "it")


@functools.cache
def _found_once(narrowed: str | None) -> _Loader:
    return _installed(_Loader())


@functools.cache
def installed_components() -> Components:
    """The installed components, found once per process."""
    return components_with(())


def components_with(requested: Sequence[str]) -> Components:
    """The installed components, and what `requested` offers beside them."""
    installed = _found_once(os.environ.get(NARROW))
    loader = copy.copy(installed)
    loader.found, loader.loaded = [*installed.found], [*installed.loaded]
    before = installed.manager.get_plugins()
    try:
        loader.request(requested)
    finally:
        for plugin in loader.manager.get_plugins() - before:
            loader.manager.unregister(plugin)
    return Components(loader.found, loader.broken, loader.loaded)


offer_installed(installed_components)


def components(kind: str) -> dict[str, type[Spec]]:
    """Name -> spec class of the installed components of a kind (`mfuser.KINDS`)."""
    return {name: c.spec for name, c in installed_components().kind(kind).items()}


def offered_by(name: str) -> list[type[Spec]]:
    """The spec classes that a module or .py file offers; it has been loaded before."""
    from mfuser.plugins.containment import contained

    with contained():
        return list(_import(name).mfuser_components())


def _cause(error: BaseException, package: str) -> str:
    """In one line, with the plugin's own line that raised it."""
    if isinstance(error, PluginError):
        return str(error)
    if isinstance(error, pluggy.PluginValidationError):
        return " ".join(str(error).split())
    where = raised_in(error, package)
    return f"{type(error).__name__}: {error}" + (f" ({where})" if where else "")


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    manager.check_pending()  # an implementation of a hook that does not exist
    if manager.get_hookcallers(plugin):
        return
    known = [n for n in vars(hookspecs) if n.startswith("mfuser_")]
    near = [n for n in dir(plugin) if n.startswith("mfuser")]
    hint = f"; it defines {', '.join(near)}, unmarked" if near else ""
    raise PluginError(f"it has no hook marked with @hookimpl{hint} (hooks: {', '.join(known)})")


def _checked(given: Any, name: str) -> list[Component]:
    """The components of what a plugin's hook returned. Raises PluginError."""
    if not isinstance(given, (list, tuple)):
        raise PluginError(
            f"mfuser_components returned {given!r}, not a list of spec classes: write return "
            "[MySpec]"
        )
    result = []
    for spec in given:
        if not (isinstance(spec, type) and issubclass(spec, Spec) and spec.kind in KINDS):
            raise PluginError(
                f"mfuser_components returned {spec!r}, which is not a spec class: subclass "
                + ", ".join(base.__name__ for base in KINDS.values())
            )
        if not isinstance(spec.model_fields["name"].default, str):
            parent = spec.__bases__[0].__name__
            raise PluginError(
                f"spec '{spec.__name__}' has no name: write class {spec.__name__}({parent}, "
                'name="…")'
            )
        base = KINDS[spec.kind]
        # Decoders that join an encoder's blocks have another way.
        ways = ("build", "build_joining")
        if all(getattr(spec, way, None) is getattr(base, way, None) for way in ways):
            raise PluginError(f"spec '{spec.__name__}' does not define build()")
        result.append(Component(spec.kind, spec.component(), spec, name))
    return result


def _package(name: str) -> str:
    """The top-level module of a plugin that was asked for."""
    path = Path(name)
    return _module_name(path) if path.suffix == ".py" else name.split(".")[0]


def _module_name(path: Path) -> str:
    return f"mfuser_plugin_{path.stem}"


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
    module_name = _module_name(path)
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
