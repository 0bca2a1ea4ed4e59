"""A run: what was asked for, resolved. `engine.folder` holds what came of it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PositiveInt, SerializeAsAny, field_serializer

from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry
from mfuser.errors import CheckpointError, DataError, MFuserError
from mfuser.interfaces import Dataset
from mfuser.plugins.contracts import undisturbed
from mfuser.specs import DatasetSpec, Options, component_of
from mfuser.version import __version__


def _stated(value: Any) -> Any:
    return None if value == {} else value


class Domain(Options):
    """A dataset under the name a report calls it by. spec: None where it is unknown, as for the
    source of a released checkpoint; written as an empty table."""

    name: str
    spec: Annotated[
        SerializeAsAny[DatasetSpec] | None, component_of("dataset"), BeforeValidator(_stated)
    ]

    @field_serializer("spec")
    def _written(self, spec: DatasetSpec | None) -> dict[str, Any]:
        return {} if spec is None else spec.model_dump(mode="json")

    def build(self, registry: Registry, split: str) -> Dataset:
        """The dataset on disk, or made on the fly.

        Raises DataError if its folder is unknown, incomplete or holds no images.
        """
        spec = self.spec
        if spec is None:
            raise DataError(f"the dataset of '{self.name}' is unknown")
        root = registry.root(spec.component()) or registry.root(self.name)
        if spec.needs_root and root is None:
            raise registry.unknown_root(spec.component())
        dataset = undisturbed(spec, lambda: spec.build(root, spec.split or split))
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
        return [Domain(name=reference if named else parts[0].label(), spec=parts[0])]
    return [Domain(name=part.label(), spec=part) for part in parts]


class RunSpec(Options):
    """Everything that decides a run's result.

    most_frequent: the class that covers most of the source, the baseline of the report.
    source_classes: the classes that the source labels.
    """

    pairing_name: str
    recipe_name: str
    pairing: PairingSpec
    recipe: RecipeSpec
    source: Domain
    targets: tuple[Domain, ...] = ()
    seed: int = 0
    world: PositiveInt = 1
    plugins: tuple[str, ...] = ()
    version: str = __version__
    most_frequent: str | None = None
    source_classes: tuple[str, ...] = ()

    @staticmethod
    def read(registry: Registry, table: Any, place: str) -> RunSpec:
        """A run as it was written into a file, typed again.

        Raises CheckpointError naming `place`, the key, and the plugins that the run needs.
        """
        if not isinstance(table, dict):
            raise CheckpointError(f"{place} is not the record of a run")
        try:
            return registry.validate(RunSpec, table, place)
        except MFuserError as error:
            raise CheckpointError(f"{error}{needed_plugins(registry, table)}") from error

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
            pairing=pairing,
            recipe=recipe,
            source=sources[0],
            targets=tuple(found.values()),
            seed=recipe.seed,
            plugins=registry.plugins,
        )


def needed_plugins(registry: Registry, run: Any) -> str:
    """ " (the run was made with --plugin X)" where a written run names plugins not loaded here."""
    named = run.get("plugins") if isinstance(run, dict) else None
    absent = [str(p) for p in named or () if p not in registry.plugins]
    options = " ".join(f"--plugin {plugin}" for plugin in absent)
    return f" (the run was made with {options})" if absent else ""
