"""A run: what was asked for, resolved. `engine.folder` holds what came of it."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry, missing_root
from mfuser.errors import DataError, MFuserError
from mfuser.interfaces import Dataset
from mfuser.specs import DatasetSpec, Options
from mfuser.version import __version__


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
