"""A run: what was asked for, resolved, and the folder that holds what came of it.

runs/NAME/run.json            pairing, recipe, domains and seed, resolved
          last.safetensors    to resume from
          model.safetensors   the finished model
          log.jsonl           loss and rate, a line per logged step
          report.{json,md,csv}, pictures/
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, ValidationError

from mfuser import __version__
from mfuser.errors import CheckpointError, DataError, MFuserError
from mfuser.interfaces import Dataset
from mfuser.pairing import PairingSpec
from mfuser.recipe import RecipeSpec
from mfuser.registry import Registry, missing_root
from mfuser.specs import DatasetSpec, Options

RUN = "run.json"
FREE = ("on_bad_image", "workers", "save_every")
"""Keys of a recipe that may change when a run goes on: its weights do not depend on them."""


class Domain(Options):
    """A dataset under the name a report calls it by. spec: its resolved table."""

    name: str
    spec: dict[str, Any]

    def build(self, registry: Registry, split: str) -> Dataset:
        """Raises DataError saying precisely what is missing."""
        spec = registry.components.validate(("dataset",), self.spec)
        assert isinstance(spec, DatasetSpec)
        root = registry.root(spec.component()) or registry.root(self.name)
        if spec.needs_root and root is None:
            raise missing_root(spec.component())
        dataset = spec.build(root, spec.split or split)
        if len(dataset) == 0:
            raise DataError(f"dataset '{self.name}' ({split}) has no images")
        dataset.test_size = spec.test_size
        return dataset


def domains(registry: Registry, reference: str) -> list[Domain]:
    """A reference such as "gta", "acdc" (four domains), "streets:night" -> its domains."""
    spec = registry.dataset(reference)
    parts = spec.expand()
    if len(parts) == 1:
        named = reference in registry.names("dataset")
        return [Domain(name=reference if named else parts[0].label(), spec=_table(parts[0]))]
    return [Domain(name=part.label(), spec=_table(part)) for part in parts]


def _table(spec: DatasetSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json")


class RunSpec(Options):
    """Everything that decides a run's result."""

    pairing_name: str
    recipe_name: str
    pairing: dict[str, Any]
    recipe: dict[str, Any]
    source: Domain
    targets: tuple[Domain, ...] = ()
    seed: int = 0
    world: PositiveInt = 1
    plugins: tuple[str, ...] = ()
    version: str = __version__
    most_frequent: str | None = None
    """The class that covers most of the source: the baseline of the report."""
    source_classes: tuple[str, ...] = ()
    """The classes that the source labels."""

    @staticmethod
    def of(
        registry: Registry,
        pairing_name: str,
        recipe_name: str,
        *,
        pairing: PairingSpec,
        recipe: RecipeSpec,
        source: str | None = None,
        targets: tuple[str, ...] = (),
    ) -> RunSpec:
        """Raises MFuserError where neither the command nor the recipe names a source."""
        source = recipe.source if source is None else source
        if source is None:
            raise MFuserError(
                f"recipe '{recipe_name}' names no source: give --source, e.g. --source gta"
            )
        sources = domains(registry, source)
        if len(sources) != 1:
            raise MFuserError(
                f"--source {source} stands for {len(sources)} domains "
                f"({', '.join(d.name for d in sources)}); name one"
            )
        found: dict[str, Domain] = {}
        for reference in targets or recipe.targets:
            found |= {d.name: d for d in domains(registry, reference)}
        return RunSpec(
            pairing_name=pairing_name,
            recipe_name=recipe_name,
            pairing=pairing.model_dump(mode="json"),
            recipe=recipe.model_dump(mode="json"),
            source=sources[0],
            targets=tuple(found.values()),
            seed=recipe.seed,
            plugins=registry.plugins,
        )


def check_folder(folder: Path, run: RunSpec, resume: bool) -> RunSpec:
    """Whether a run may begin or go on in a folder; returns the run as it was begun.

    Raises CheckpointError if the folder holds something else. Nothing is written.
    """
    file = folder / RUN
    if file.is_file():
        begun = read_run(folder)
        if not resume:
            raise CheckpointError(
                f"{folder} already holds a run ('{begun.pairing_name}', recipe "
                f"'{begun.recipe_name}'); continue it with --resume or choose another --out"
            )
        same = {"recipe": begun.recipe | {k: run.recipe[k] for k in FREE}}
        was = begun.model_copy(update=same)
        differing = [
            key
            for key in ("pairing", "recipe", "source", "seed", "world")
            if getattr(was, key) != getattr(run, key)
        ]
        if differing:
            raise CheckpointError(
                f"{folder} holds another run: its {_difference(was, run, differing[0])}; resume "
                "with the same settings or choose another --out"
            )
        return begun
    if resume:
        raise CheckpointError(f"{folder} holds no run to resume (there is no {RUN})")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty and holds no run; choose another --out")
    return run


def open_folder(folder: Path, run: RunSpec, resume: bool) -> RunSpec:
    """Make or reopen a run's folder; returns the run as it was begun.

    Raises CheckpointError as `check_folder` does, or if the folder cannot be written.
    """
    run = check_folder(folder, run, resume)
    if not (folder / RUN).is_file():
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, run.model_dump(mode="json"))
    return run


def check_writable(folder: Path) -> None:
    """Raises CheckpointError where the folder takes no files or cannot be made; makes nothing."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        reason = "a file of that name is there" if folder.is_file() else error.strerror
        raise CheckpointError(
            f"the folder {folder} cannot be written: {reason}; choose another --out"
        ) from error


def clear_folder(folder: Path) -> None:
    """Undo `open_folder` for a run that failed before there was anything to keep."""
    for name in (RUN, "log.jsonl"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: the rest is somebody else's
        folder.rmdir()


def read_run(folder: Path) -> RunSpec:
    file = folder / RUN
    try:
        return RunSpec.model_validate(json.loads(file.read_text("utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no run (there is no {RUN})") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {brief(error)}") from error


def brief(error: Exception) -> str:
    """The first problem of an error, on one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split())


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _difference(begun: RunSpec, run: RunSpec, key: str) -> str:
    old, new = getattr(begun, key), getattr(run, key)
    if isinstance(old, dict):
        changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        return f"{key}.{changed[0]} is {old.get(changed[0])!r}, not {new.get(changed[0])!r}"
    return f"{key} is {getattr(old, 'name', old)!r}, not {getattr(new, 'name', new)!r}"
