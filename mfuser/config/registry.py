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
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import RecipeSpec
from mfuser.config.study import KINDS as STUDY_KINDS
from mfuser.config.study import AnyStudy
from mfuser.errors import DataError, RegistryError, suggest
from mfuser.plugins.components import Components
from mfuser.plugins.discovery import installed_components, load_components
from mfuser.specs import KINDS, DatasetSpec, Spec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLES = ("pairing", "recipe", "dataset", "study")
"""Tables of named entries; beside them `[plugins]` and `[data]`."""

Table = dict[str, Any]
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
    return Registry([_read(f) for f in files], plugins, data_roots)


class Registry:
    """Named tables from the files, and the components they may name."""

    def __init__(
        self,
        layers: Sequence[tuple[str, Table]],
        plugins: Sequence[str] = (),
        data_roots: Sequence[str] = (),
    ) -> None:
        self._tables: dict[str, dict[str, Table]] = {kind: {} for kind in TABLES}
        self._where: dict[tuple[str, ...], str] = {}
        self._data: dict[str, Path] = {}
        self._data_roots = list(data_roots)
        requested = list(plugins)
        for file, document in layers:
            requested += self._add(file, document)
        self.plugins = tuple(dict.fromkeys(requested))
        self.components: Components = (
            load_components(self.plugins) if self.plugins else installed_components()
        )

    def names(self, kind: str) -> list[str]:
        """Names of the `pairing`, `recipe`, `dataset` or `study` tables."""
        return sorted(self._tables[kind])

    def where(self, kind: str, name: str) -> str:
        """The file that (last) defines a table."""
        return self._where.get((kind, name), "?")

    def raw(self, kind: str, name: str) -> Table:
        """A table with its `extends` applied, as written; not validated."""
        return self._inherit(kind, name, ())

    def pairing(self, name: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> PairingSpec:
        """A pairing, resolved and validated. overrides: a table, or "key.key=value" strings."""
        return self._resolve("pairing", name, PairingSpec, overrides)

    def recipe(self, name: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RecipeSpec:
        """A recipe, resolved and validated."""
        return self._resolve("recipe", name, RecipeSpec, overrides)

    def study(self, name: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> AnyStudy:
        """A study, resolved and validated; its variants are `mfuser.study.grid`'s to resolve."""
        kind = self.raw("study", name).get("kind", "training")
        if kind not in STUDY_KINDS:
            raise RegistryError(
                f"{self.where('study', name)} [study.{name}]: kind = {kind!r}: there is no such "
                f"kind{suggest(str(kind), STUDY_KINDS)}"
            )
        return self._resolve("study", name, STUDY_KINDS[kind], overrides)

    def dataset(self, reference: str) -> DatasetSpec:
        """ "gta", "acdc:fog" (a dataset and its variant), or the name of a [dataset.NAME] table."""
        if reference in self._tables["dataset"]:
            table = self.raw("dataset", reference)
            place = f"{self.where('dataset', reference)} [dataset.{reference}]"
        else:
            name, _, variant = reference.partition(":")
            known = self.components.kind("dataset")
            if name not in known:
                if name in self._tables["dataset"]:
                    raise RegistryError(
                        f"[dataset.{name}] is a table, which takes no variant '{variant}'"
                    )
                names = [*known, *self._tables["dataset"]]
                raise RegistryError(f"no dataset is called '{name}'{suggest(name, names)}")
            table, place = {"name": name}, f"dataset '{reference}'"
            if variant:
                field = known[name].spec.variant  # type: ignore[attr-defined]
                if field is None:
                    raise RegistryError(f"dataset '{name}' has no variants; '{variant}' is none")
                table[field] = variant
        try:
            spec = self.components.validate(("dataset",), table)
        except (ValidationError, ValueError) as error:
            raise RegistryError(self._explain(error, None, table, lambda _: place)) from error
        assert isinstance(spec, DatasetSpec)
        return spec

    def root(self, dataset: str) -> Path | None:
        """Where a dataset lies: --data-root, then MFUSER_DATA, then [data]."""
        for given in self._data_roots:
            name, sep, path = given.partition("=")
            if sep and name == dataset:
                return Path(path).expanduser()
            if not sep:
                return Path(given).expanduser() / dataset
        base = os.environ.get("MFUSER_DATA")
        if base and ((Path(base) / dataset).is_dir() or dataset not in self._data):
            return Path(base).expanduser() / dataset
        return self._data.get(dataset)

    def saved_pairing(self, table: Table, settings: Sequence[str], place: str) -> PairingSpec:
        """A resolved table out of a checkpoint, with settings on top -> its spec."""
        return self.validate(PairingSpec, merge(table, parse_settings(settings)), place)

    def validate(self, model: type[Model], table: Table, place: str) -> Model:
        """A table of options -> an instance of `model`, with the components installed here.

        Raises RegistryError: `place`, the key, and what is allowed there.
        """
        return self._validate(model, table, lambda _: place)

    def _add(self, file: str, document: Table) -> list[str]:
        """Layer one file; returns the plugins it asks for."""
        plugins = document.get("plugins", {})
        for key, value in document.items():
            if key in TABLES:
                self._add_tables(file, key, value)
            elif key == "data":
                self._add_roots(file, value)
            elif key != "plugins":
                raise RegistryError(
                    f"{file}: no table is called [{key}]"
                    f"{suggest(key, [*TABLES, 'plugins', 'data'])}"
                )
        if isinstance(plugins, dict):
            unknown = [k for k in plugins if k != "load"]
            if unknown:
                raise RegistryError(
                    f"{file} [plugins]: no such key '{unknown[0]}'; write load = [\"module\", "
                    '"path/to/plugin.py"]'
                )
            plugins = plugins.get("load", [])
        if not isinstance(plugins, list) or not all(isinstance(p, str) for p in plugins):
            raise RegistryError(f"{file} [plugins]: 'load' takes a list of modules or .py files")
        # A path is meant from where the file lies, not from where the command runs.
        base = Path(file).parent
        return [str(base / p) if p.endswith(".py") else p for p in plugins]

    def _add_tables(self, file: str, kind: str, tables: Any) -> None:
        if not isinstance(tables, dict):
            raise RegistryError(f"{file}: '{kind}' is a table of tables: [{kind}.NAME]")
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise RegistryError(f"{file}: [{kind}.{name}] is a table, not {table!r}")
            known = self._tables[kind].get(name, {})
            self._tables[kind][name] = merge(known, table)
            self._where[(kind, name)] = file
            for path in _paths(table):
                self._where[(kind, name, *path)] = file

    def _add_roots(self, file: str, roots: Any) -> None:
        if not isinstance(roots, dict) or not all(isinstance(v, str) for v in roots.values()):
            raise RegistryError(f'{file} [data]: write NAME = "folder"')
        base = Path(file).parent
        self._data |= {name: base / Path(path).expanduser() for name, path in roots.items()}

    def _inherit(self, kind: str, name: str, chain: tuple[str, ...]) -> Table:
        tables = self._tables[kind]
        if name not in tables:
            by = f" (extended by [{kind}.{chain[-1]}])" if chain else ""
            raise RegistryError(f"no {kind} is called '{name}'{by}{suggest(name, tables)}")
        if name in chain:
            loop = " -> ".join([*chain[chain.index(name) :], name])
            raise RegistryError(
                f"{self.where(kind, name)} [{kind}.{name}] extends: a circle: {loop}"
            )
        table = dict(tables[name])
        parent = table.pop("extends", None)
        if parent is None:
            return table
        if not isinstance(parent, str):
            raise RegistryError(
                f"{self.where(kind, name)} [{kind}.{name}] extends: takes one name, not {parent!r}"
            )
        inherited = self._inherit(kind, parent, (*chain, name))
        for path in _paths(inherited):
            origin = self._where.get((kind, parent, *path))
            if origin:
                self._where.setdefault((kind, name, *path), f"{origin} (via [{kind}.{parent}])")
        return merge(inherited, table)

    def _resolve(
        self, kind: str, name: str, model: type[Model], overrides: Mapping[str, Any] | Sequence[str]
    ) -> Model:
        table = self.raw(kind, name)
        given = dict(overrides) if isinstance(overrides, Mapping) else parse_settings(overrides)
        table = merge(table, given)
        overridden = set(_paths(given))

        def place(path: tuple[str, ...]) -> str:
            for end in range(len(path), -1, -1):
                if path[:end] in overridden:
                    return "--set"
                if (kind, name, *path[:end]) in self._where:
                    return f"{self._where[(kind, name, *path[:end])]} [{kind}.{name}]"
            return f"[{kind}.{name}]"

        return self._validate(model, table, place)

    def _validate(self, model: type[Model], table: Table, place: Any) -> Model:
        try:
            return model.model_validate(table, context={"components": self.components})
        except ValidationError as error:
            raise RegistryError(self._explain(error, model, table, place)) from error

    def _explain(
        self, error: Exception, model: type[BaseModel] | None, table: Table, place: Any
    ) -> str:
        """The first problem as file, table, key and remedy; how many more there are."""
        if not isinstance(error, ValidationError):
            return f"{place(())}: {error}"
        problems = error.errors(include_url=False)
        first = problems[0]
        path, owner = self._walk([str(p) for p in first["loc"]], model, table)
        key = ".".join(path)
        kind, message = first["type"], first["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            known = [k for k in owner.model_fields if k != "name"] if owner else []
            text = f"{key}: there is no such key{suggest(path[-1], known)}"
        elif kind == "missing":
            text = f"{key}: missing"
        elif kind == "value_error":
            text = f"{key}: {message}" if key else message
        else:
            text = f"{key} = {_short(first['input'])}: {message[0].lower()}{message[1:]}"
        more = len(problems) - 1
        return f"{place(tuple(path))}: {text}" + (f" (and {more} more)" if more else "")

    def _walk(
        self, loc: list[str], model: type[BaseModel] | None, table: Any
    ) -> tuple[list[str], type[BaseModel] | None]:
        """A pydantic location -> the path of keys as written, and the model that owns the last."""
        path: list[str] = []
        owner = model or self._spec_of(table)
        for part in loc:
            named = table.get("name") if isinstance(table, dict) else table
            if named == part and (not isinstance(table, dict) or part not in table):
                continue  # the tag of a union's member
            if path:
                owner = self._spec_of(table) or _inner_model(owner, path[-1])
            path.append(part)
            table = table.get(part) if isinstance(table, dict) else None
        return path, owner

    def _spec_of(self, table: Any) -> type[Spec] | None:
        name = table.get("name") if isinstance(table, dict) else None
        for kind in KINDS:
            if name in (found := self.components.kind(kind)):
                spec = found[name].spec
                if set(table) - {"name"} <= set(spec.model_fields) or kind != "vision":
                    return spec
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Table:
    """`above` on `below`: tables merge key by key, unless the upper one names its component."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, str) and isinstance(value, dict) and "name" not in value:
            under = {"name": under}  # "linear" is short for {name = "linear"}
        if isinstance(under, dict) and isinstance(value, dict) and "name" not in value:
            merged[key] = merge(under, value)
        else:
            merged[key] = value
    return merged


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


def _read(path: Path) -> tuple[str, Table]:
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


def _paths(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key path of a table, parents before children."""
    paths: list[tuple[str, ...]] = []
    for key, value in table.items():
        path = (*prefix, str(key))
        paths.append(path)
        if isinstance(value, Mapping):
            paths += _paths(value, path)
    return paths


def _inner_model(owner: type[BaseModel] | None, field: str) -> type[BaseModel] | None:
    """The options model a field holds, if it holds one."""
    if owner is None or field not in owner.model_fields:
        return None
    annotation = owner.model_fields[field].annotation
    options = (
        get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    )
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def missing_root(dataset: str) -> DataError:
    """The error for a dataset whose folder nobody has named."""
    return DataError(
        f"nothing says where '{dataset}' lies: give --data-root {dataset}=FOLDER, set "
        f"MFUSER_DATA to the folder that holds '{dataset}/', or write [data] {dataset} = "
        '"FOLDER" in a registry'
    )
