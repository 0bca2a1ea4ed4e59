"""registry.toml: pairings, recipes and datasets by name, layered from several files.

    [pairing.mine]
    extends = "dinov2-l_eva02-clip-l"
    vlm     = { name = "open_clip", model = "ViT-L-14-336", weights = "openai" }
    fusion.state_size = 8

Files layer (what ships, then ./registry.toml or --registry FILE, then --set), `extends` inherits.
Both merge tables the same way: a table that names its component replaces the one below it, a
table that does not name one changes single options of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mfuser.config import tables
from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import RecipeSpec
from mfuser.config.roots import DataRoots
from mfuser.config.study import KINDS as STUDY_KINDS
from mfuser.config.study import AnyStudy
from mfuser.config.tables import Keys, Table, merge, parse_settings
from mfuser.errors import DataError, PluginError, RegistryError, placed, problem, suggest
from mfuser.plugins.components import Components
from mfuser.plugins.discovery import components_with, installed_components
from mfuser.specs import DatasetSpec, Spec

TABLES = ("pairing", "recipe", "dataset", "study")
"""Tables of named entries; beside them `[plugins]` and `[data]`."""

INSTEAD = {"source": "sources", "sources": "source"}
"""Keys of a recipe that say the same: one replaces the other of the table below it."""

Overrides = Mapping[str, Any] | Sequence[str]
"""Changes of a table: another table, or "key.key=value" strings."""
Place = Callable[[Keys], str]
"""The path of a key -> where it is written, for messages."""
Model = TypeVar("Model", bound=BaseModel)


def shipped() -> Path:
    """The registry that ships: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    packaged = package / "registry.toml"
    return packaged if packaged.is_file() else package.parent / "registry.toml"


def load_registry(
    *paths: str | os.PathLike[str], plugins: Sequence[str] = (), data_roots: Sequence[str] = ()
) -> Registry:
    """The shipped registry with files on top: `paths`, or ./registry.toml if none are given.

    plugins: modules or .py files to load besides what is installed and what the files' [plugins]
        name. data_roots: "NAME=PATH" or one folder that holds them all, before any other root.

    Raises RegistryError naming file and line, or file, table and key; PluginError.
    """
    files = [shipped()]
    if paths:
        files += [Path(p) for p in paths]
    elif Path("registry.toml").is_file() and not Path("registry.toml").samefile(shipped()):
        files.append(Path("registry.toml"))
    return Registry([tables.read(f) for f in files], plugins, data_roots)


@dataclass(frozen=True)
class Origin:
    """The place where a key is written: in `file`, in the table `name` of its kind."""

    file: str
    name: str


class Registry:
    """Named tables from the files, and the components they may name."""

    def __init__(
        self,
        layers: Sequence[tuple[str, Table]],
        plugins: Sequence[str] = (),
        data_roots: Sequence[str] = (),
    ) -> None:
        self._tables: dict[str, dict[str, Table]] = {kind: {} for kind in TABLES}
        self._origins: dict[Keys, Origin] = {}
        requested: dict[str, str | None] = dict.fromkeys(plugins)  # -> the file that asks for it
        declared: dict[str, Path] = {}
        for file, document in layers:
            for key, value in document.items():
                if key in TABLES:
                    self._add_tables(file, key, value)
                elif key == "data":
                    declared |= _declared_roots(file, value)
                elif key == "plugins":
                    for plugin in _asked(file, value):
                        requested.setdefault(plugin, file)
                else:
                    raise RegistryError(
                        f"{tables.located(file, (key,))}: no table is called [{key}]"
                        f"{suggest(key, [*TABLES, 'plugins', 'data'])}"
                    )
        self.plugins = tuple(requested)
        self._roots = DataRoots(data_roots, declared)
        try:
            self.components: Components = (
                components_with(self.plugins) if self.plugins else installed_components()
            )
        except PluginError as error:
            by = requested.get(error.plugin or "")
            if by is None:
                raise
            raise placed(error, f"{tables.located(by, ('plugins', 'load'))} [plugins]") from error

    # ---- what there is

    def names(self, kind: str) -> list[str]:
        """Names of the `pairing`, `recipe`, `dataset` or `study` tables."""
        return sorted(self._tables[kind])

    def where(self, kind: str, name: str) -> str:
        """The file that (last) defines a table."""
        origin = self._origins.get((kind, name))
        return origin.file if origin else "?"

    def place(self, kind: str, name: str, *path: str) -> str:
        """ "registry.toml:12 [pairing.mine]": where a key of a table is written, for messages."""
        for end in range(len(path), -1, -1):
            origin = self._origins.get((kind, name, *path[:end]))
            if origin is not None:
                line = tables.located(origin.file, (kind, origin.name, *path[:end]))
                by = f" (extended by [{kind}.{name}])" if origin.name != name else ""
                return f"{line} [{kind}.{origin.name}]{by}"
        return f"[{kind}.{name}]"

    def recipe_of(self, pairing: str) -> str:
        """The recipe that a pairing is trained with where none is named: that of its name, or of
        the name of the nearest pairing that it extends; else "paper"."""
        seen: list[str] = []
        name: Any = pairing
        while isinstance(name, str) and name not in seen:
            if name in self._tables["recipe"]:
                return name
            seen.append(name)
            name = self._tables["pairing"].get(name, {}).get("extends")
        return "paper"

    def raw(self, kind: str, name: str) -> Table:
        """A table with its `extends` applied, as written; not validated."""
        return self._inherit(kind, name, ())

    # ---- what is resolved

    def pairing(self, name: str, overrides: Overrides = (), by: str = "--set") -> PairingSpec:
        """A pairing, resolved and validated.

        overrides: a table, or "key.key=value" strings. by: what gives them, for messages.
        """
        return self._resolve("pairing", name, PairingSpec, overrides, by)

    def recipe(self, name: str, overrides: Overrides = (), by: str = "--set-recipe") -> RecipeSpec:
        """A recipe, resolved and validated, with overrides as for `pairing`."""
        return self._resolve("recipe", name, RecipeSpec, overrides, by)

    def study(
        self, name: str, overrides: Overrides = (), by: str | Mapping[str, str] = "--set"
    ) -> AnyStudy:
        """A study, resolved and validated; its variants are `mfuser.study.grid`'s to resolve.

        by: as for `pairing`, or what gives each top-level key.
        """
        kind = self.raw("study", name).get("kind", "training")
        if kind not in STUDY_KINDS:
            raise RegistryError(
                f"{self.place('study', name, 'kind')}: kind = {kind!r}: there is no such "
                f"kind{suggest(str(kind), STUDY_KINDS)}"
            )
        return self._resolve("study", name, STUDY_KINDS[kind], overrides, by)

    def dataset(self, reference: str) -> DatasetSpec:
        """ "gta", "acdc:fog" (a dataset and its variant), or the name of a [dataset.NAME] table."""
        named = self._tables["dataset"]
        if reference in named:
            table = self.raw("dataset", reference)
            return self._dataset(table, lambda path: self.place("dataset", reference, *path))
        name, _, variant = reference.partition(":")
        known = self.components.kind("dataset")
        if name not in known:
            if name in named:
                raise RegistryError(
                    f"[dataset.{name}] is a table, which takes no variant '{variant}'"
                )
            raise RegistryError(f"no dataset is called '{name}'{suggest(name, [*known, *named])}")
        table = {"name": name}
        if variant:
            field = known[name].spec.variant  # type: ignore[attr-defined]
            if field is None:
                raise RegistryError(
                    f"dataset '{name}' has no variants, so '{variant}' cannot be one"
                )
            table[field] = variant
        return self._dataset(table, lambda _: f"dataset '{reference}'")

    def component(self, kind: str, value: Any, place: str) -> Spec:
        """A name, or a table with one -> the spec of that component. Raises RegistryError."""
        return self._component(kind, value, lambda _: place)

    def validate(self, model: type[Model], table: Table, place: str) -> Model:
        """A table of options -> an instance of `model`, with the components installed here.

        Raises RegistryError: `place`, the key, and what is allowed there.
        """
        return self._validate(model, table, lambda _: place)

    def saved_pairing(self, table: Table, settings: Sequence[str], place: str) -> PairingSpec:
        """A resolved table out of a checkpoint, with settings on top -> its spec."""
        return self.validate(PairingSpec, merge(table, parse_settings(settings)), place)

    # ---- data

    def root(self, dataset: str) -> Path | None:
        """The folder of a dataset: from --data-root, then MFUSER_DATA, then [data]."""
        return self._roots.find(dataset)

    def unknown_root(self, dataset: str) -> DataError:
        """The error for a dataset whose folder is not stated."""
        return self._roots.unknown(dataset)

    # ---- within

    def _add_tables(self, file: str, kind: str, added: Any) -> None:
        if not isinstance(added, dict):
            raise RegistryError(
                f"{tables.located(file, (kind,))}: '{kind}' is a table of tables: [{kind}.NAME]"
            )
        for name, table in added.items():
            if not isinstance(table, dict):
                line = tables.located(file, (kind, name))
                raise RegistryError(f"{line}: [{kind}.{name}] is a table, not {table!r}")
            self._tables[kind][name] = _over(kind, self._tables[kind].get(name, {}), table)
            for path in ((), *tables.paths(table)):
                self._origins[(kind, name, *path)] = Origin(file, name)

    def _inherit(self, kind: str, name: str, chain: tuple[str, ...]) -> Table:
        known = self._tables[kind]
        if name not in known:
            by = f"{self.place(kind, chain[-1], 'extends')} extends: " if chain else ""
            raise RegistryError(f"{by}no {kind} is called '{name}'{suggest(name, known)}")
        if name in chain:
            loop = " -> ".join([*chain[chain.index(name) :], name])
            raise RegistryError(f"{self.place(kind, name, 'extends')} extends: a circle: {loop}")
        table = dict(known[name])
        parent = table.pop("extends", None)
        if parent is None:
            return table
        if not isinstance(parent, str):
            raise RegistryError(
                f"{self.place(kind, name, 'extends')} extends: takes one name, not {parent!r}"
            )
        inherited = self._inherit(kind, parent, (*chain, name))
        for path in tables.paths(inherited):
            origin = self._origins.get((kind, parent, *path))
            if origin is not None:
                self._origins.setdefault((kind, name, *path), origin)
        return _over(kind, inherited, table)

    def _resolve(
        self,
        kind: str,
        name: str,
        model: type[Model],
        overrides: Overrides,
        by: str | Mapping[str, str],
    ) -> Model:
        given = dict(overrides) if isinstance(overrides, Mapping) else parse_settings(overrides)
        laid = tables.values(given)

        def place(path: Keys) -> str:
            if any(path[: len(key)] == key for key in laid):
                return _by(by, path)
            written = self.place(kind, name, *path)
            below = [_by(by, key) for key in laid if key[: len(path)] == path]
            if not below:
                return written
            # A rule across keys, some laid over what is written; or all of a table's keys are.
            laid_by = ", ".join(dict.fromkeys(below))
            return f"{laid_by} on {written}" if (kind, name, *path) in self._origins else laid_by

        return self._validate(model, _over(kind, self.raw(kind, name), given), place)

    def _dataset(self, table: Table, place: Place) -> DatasetSpec:
        spec = self._component("dataset", table, place)
        assert isinstance(spec, DatasetSpec)
        return spec

    def _component(self, kind: str, value: Any, place: Place) -> Spec:
        try:
            return self.components.validate((kind,), value)
        except ValidationError as error:
            raise _refused(error, value, place) from error
        except ValueError as error:
            raise RegistryError(f"{place(())}: {error}") from error

    def _validate(self, model: type[Model], table: Table, place: Place) -> Model:
        try:
            return model.model_validate(table, context={"components": self.components})
        except ValidationError as error:
            raise _refused(error, table, place) from error


def _over(kind: str, below: Table, above: Mapping[str, Any]) -> Table:
    """A table of a kind on another."""
    if kind == "recipe":
        below = {key: value for key, value in below.items() if INSTEAD.get(key) not in above}
    return merge(below, above)


def _by(by: str | Mapping[str, str], path: Keys) -> str:
    return by if isinstance(by, str) else by[path[0]]


def _refused(error: ValidationError, table: Any, place: Place) -> RegistryError:
    """The first problem as file, line, table, key and remedy; how many more there are."""
    path, text = problem(error, table)
    where = place(tuple(path))
    return RegistryError(f"{where}{': ' if where else ''}{'.'.join(path)}{text}")


def _asked(file: str, given: Any) -> list[str]:
    """The plugins of a [plugins] table; paths are relative to the file."""
    place = f"{tables.located(file, ('plugins',))} [plugins]"
    if isinstance(given, dict):
        unknown = [k for k in given if k != "load"]
        if unknown:
            raise RegistryError(
                f"{place}: {unknown[0]}: there is no such key; write load = "
                '["module", "path/to/plugin.py"]'
            )
        given = given.get("load", [])
    if not isinstance(given, list) or not all(isinstance(p, str) for p in given):
        raise RegistryError(f"{place}: load = {given!r}: takes a list of modules or .py files")
    base = Path(file).parent
    return [str(base / p) if p.endswith(".py") else p for p in given]


def _declared_roots(file: str, roots: Any) -> dict[str, Path]:
    """The folders of a [data] table; paths are relative to the file."""
    if not isinstance(roots, dict):
        line = tables.located(file, ("data",))
        raise RegistryError(f'{line}: [data] is a table of folders: NAME = "FOLDER"')
    base = Path(file).parent
    for name, path in roots.items():
        if not isinstance(path, str):
            place = f"{tables.located(file, ('data', name))} [data]"
            raise RegistryError(f'{place}: {name} = {path!r}: write {name} = "FOLDER"')
    return {name: base / Path(path).expanduser() for name, path in roots.items()}
