"""Finding plugins, and the frozen dictionary of the components they offer.

A plugin is a stranger's code: what it raises, how long it takes to import, which version it asks
for and what it offers are its own affair, and the others go on working.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from mfuser import hookspecs
from mfuser.errors import PluginError, suggest
from mfuser.plugins.components import NARROW, BrokenPlugin, Component, Components
from mfuser.plugins.timelimit import TimeLimit, limited
from mfuser.specs import KINDS, Spec, offer_installed
from mfuser.specs import component_of as component_of
from mfuser.version import __version__

GROUP = "mfuser"
"""The entry-point group of installed plugins."""

TIMEOUT = "MFUSER_PLUGIN_TIMEOUT"
"""Environment variable: seconds a plugin may take to import. Unset: 20; 0: no limit."""

REQUIRES = "mfuser_requires"
"""Attribute of a plugin's module: the versions of mfuser it works with, ">=0.1,<0.2"."""


def load_components(requested: Sequence[str] = ()) -> Components:
    """Everything that entry points offer, and what `requested` (modules or .py files) offers.

    An installed plugin that fails is recorded in `broken` and the others go on working; one
    asked for by name is an error. `MFUSER_PLUGINS` narrows what is installed.
    """
    broken: list[BrokenPlugin] = []
    manager = pluggy.PluginManager("mfuser")
    manager.add_hookspecs(hookspecs)
    entries = _narrowed(sorted(set(metadata.entry_points(group=GROUP)), key=_order))
    if entries or requested:
        # Every plugin needs it, and a cold disk's seconds for torch are no plugin's fault.
        importlib.import_module("mfuser.interfaces")
    for entry in entries:
        label = f"{entry.name} ({entry.value})"
        # Two distributions may give one name to different modules: both are heard.
        name = label if manager.has_plugin(entry.name) else entry.name
        _register(manager, name, label, functools.partial(_load, entry), broken)
    for name in requested:
        _register(manager, name, name, functools.partial(_import, name), None)
    found: list[Component] = []
    for name, plugin in manager.list_name_plugin():
        if plugin is not None:
            found += _offered(name, manager, plugin, None if name in requested else broken)
    return Components(found, broken)


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
    known = {e.name for e in entries}
    for name in sorted(kept | dropped):
        if name not in known:
            raise PluginError(
                f"{NARROW}={given}: no installed plugin is called '{name}'{suggest(name, known)}"
            )
    chosen = kept or (known if dropped else set())
    return [e for e in entries if e.name in chosen - dropped]


def _load(entry: metadata.EntryPoint) -> Any:
    """An installed plugin, imported if its distribution allows this version of mfuser."""
    package = entry.dist
    for text in (package.requires if package else None) or ():
        try:
            needed = Requirement(text)
        except InvalidRequirement:
            continue
        if needed.name.lower() == "mfuser" and (
            needed.marker is None or needed.marker.evaluate({"extra": ""})
        ):
            _check_version(needed.specifier, f"its package {package and package.name}")
    return entry.load()


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
            f'{REQUIRES} = {given!r} is no set of versions; write e.g. ">=0.1,<0.2"'
        ) from error
    _check_version(allowed, "it")


def _seconds() -> float:
    given = os.environ.get(TIMEOUT, "20")
    try:
        return float(given)
    except ValueError as error:
        raise PluginError(f"{TIMEOUT}={given} is no number of seconds") from error


@functools.cache
def installed_components() -> Components:
    """What is installed, found once per process."""
    return load_components()


offer_installed(installed_components)


def components(kind: str) -> dict[str, type[Spec]]:
    """Name -> spec class of the installed components of a kind (`mfuser.KINDS`)."""
    return {name: c.spec for name, c in installed_components().kind(kind).items()}


def offered_by(name: str) -> list[type[Spec]]:
    """The spec classes that a module or .py file offers; it has been loaded before."""
    return list(_import(name).mfuser_components())


def _register(
    manager: pluggy.PluginManager,
    name: str,
    label: str,
    load: Callable[[], Any],
    broken: list[BrokenPlugin] | None,
) -> None:
    """Load one plugin and check its hooks; `broken` None: a failure is an error."""
    seconds = _seconds()
    try:
        plugin = limited(seconds, load)
        if manager.is_registered(plugin):
            return
        _declared(plugin)
        try:
            manager.register(plugin, name)
            _check_hooks(manager, plugin)
        except Exception:
            if manager.is_registered(plugin):
                manager.unregister(plugin)
            raise
    except (Exception, SystemExit, TimeLimit) as error:
        if isinstance(error, pluggy.PluginValidationError):
            cause = " ".join(str(error).split())
        else:
            cause = _cause(error, seconds, "importing it")
        if broken is None:
            raise PluginError(f"plugin '{label}' cannot be used: {cause}", label) from error
        broken.append(BrokenPlugin(label, cause))


def _cause(error: BaseException, seconds: float, what: str) -> str:
    if isinstance(error, PluginError):
        return str(error)
    if isinstance(error, TimeLimit):
        more = max(60, 3 * seconds)
        return (
            f"{what} took more than {seconds:g} s and was stopped; {TIMEOUT}={more:g} allows more"
        )
    return f"{type(error).__name__}: {error}"


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
    seconds = _seconds()
    try:
        hook = manager.subset_hook_caller(
            "mfuser_components",
            [p for p in manager.get_plugins() if p is not plugin],
        )
        specs = limited(seconds, hook)
        # pluggy leaves out a hook that returned None.
        given = specs[0] if specs else None
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
                base = spec.__bases__[0].__name__
                raise PluginError(
                    f"spec '{spec.__name__}' has no name: write class {spec.__name__}({base}, "
                    'name="…")'
                )
            if getattr(spec, "build") is getattr(KINDS[spec.kind], "build"):  # noqa: B009
                raise PluginError(f"spec '{spec.__name__}' does not define build()")
            result.append(Component(spec.kind, spec.component(), spec, name))
        return result
    except (Exception, SystemExit, TimeLimit) as error:
        cause = _cause(error, seconds, "its hook mfuser_components")
        if broken is None:
            raise PluginError(f"plugin '{name}' cannot be used: {cause}", name) from error
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
