"""A run: what was asked for, resolved. `engine.folder` holds what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
    model_validator,
)

from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import RecipeSpec, SourceSpec, parse_sources
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

    def same_images(self, other: Domain) -> bool:
        """Whether two domains are one, whatever part of it is read and how."""
        if self.name == other.name:
            return True
        if self.spec is None or other.spec is None:
            return False
        read_alike = {"split": None, "test_size": None}
        return self.spec.model_copy(update=read_alike) == other.spec.model_copy(update=read_alike)


class Source(Domain):
    """A domain that is trained on. share: of the crops."""

    share: PositiveFloat = 1.0


def domains(registry: Registry, reference: str) -> list[Domain]:
    """A reference such as "gta", "acdc" (four domains), "streets:night" -> its domains."""
    spec = registry.dataset(reference)
    parts = spec.expand()
    if len(parts) == 1:
        named = reference in registry.names("dataset")
        return [Domain(name=reference if named else parts[0].label(), spec=parts[0])]
    return [Domain(name=part.label(), spec=part) for part in parts]


def sources(registry: Registry, named: str | Sequence[SourceSpec]) -> tuple[Source, ...]:
    """The sources of a command ("gta,synthia=…") or a recipe, with their shares of the crops.

    Raises MFuserError for names that are not known, stand for several domains or for the same
    images, and for weights that do not go together.
    """
    if isinstance(named, str):
        try:
            named = parse_sources(named)
        except ValueError as error:
            raise MFuserError(f"--source {named}: {error}") from error
    if not named:
        raise MFuserError("--source names no dataset; give one, e.g. --source gta")
    total = sum(source.weight or 1.0 for source in named)
    found: list[Source] = []
    for one in named:
        parts = domains(registry, one.name)
        if len(parts) != 1:
            names = ", ".join(d.name for d in parts)
            raise MFuserError(
                f"--source {one.name} stands for {len(parts)} domains ({names}); name one, or "
                "those that you mean, separated by commas"
            )
        for other in found:
            if other.same_images(parts[0]):
                raise MFuserError(
                    f"sources '{other.name}' and '{parts[0].name}' are the same images; name them "
                    "once, with a larger weight if need be"
                )
        share = (one.weight or 1.0) / total
        found.append(Source(name=parts[0].name, spec=parts[0].spec, share=share))
    return tuple(found)


class RunSpec(Options):
    """Everything that decides a run's result.

    most_frequent: the class that covers most of the sources, the baseline of the report.
    source_classes: the classes that the sources label.
    precision: what it computes in on the device that it began on.
    """

    pairing_name: str
    recipe_name: str
    pairing: PairingSpec
    recipe: RecipeSpec
    sources: tuple[Source, ...]
    targets: tuple[Domain, ...] = ()
    seed: int = 0
    world: PositiveInt = 1
    plugins: tuple[str, ...] = ()
    version: str = __version__
    most_frequent: str | None = None
    source_classes: tuple[str, ...] = ()
    precision: str = "float32"

    @model_validator(mode="after")
    def _trains(self) -> RunSpec:
        if not self.sources:
            raise ValueError("a run has at least one source")
        return self

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """One source is written as `source`, several as `sources`; no precision where it is
        float32, as before there was a choice."""
        table: dict[str, Any] = handler(self)
        if self.precision == "float32":
            table.pop("precision", None)
        if len(table.get("sources", ())) != 1:
            return table
        one = {key: value for key, value in table["sources"][0].items() if key != "share"}
        return {
            "source" if key == "sources" else key: one if key == "sources" else value
            for key, value in table.items()
        }

    @property
    def batch(self) -> int:
        """Crops per optimizer step, of all processes together."""
        return self.recipe.batch_size * self.recipe.accumulate * self.world

    @property
    def source_names(self) -> str:
        """ "gta", or "gta 70 %, synthia 30 %"."""
        if len(self.sources) == 1:
            return self.sources[0].name
        return ", ".join(f"{s.name} {100 * s.share:.3g} %" for s in self.sources)

    @staticmethod
    def read(registry: Registry, table: Any, place: str) -> RunSpec:
        """A run as it was written into a file, typed again.

        Raises CheckpointError naming `place`, the key, and the plugins that the run needs.
        """
        if not isinstance(table, dict):
            raise CheckpointError(f"{place} is not the record of a run")
        single = "source" in table and "sources" not in table  # as `_written` leaves it
        if single:
            table = {k: v for k, v in table.items() if k != "source"} | {
                "sources": [table["source"]]
            }
        try:
            return registry.validate(RunSpec, table, place)
        except MFuserError as error:
            text = str(error).replace("sources.0.", "source.", int(single))
            raise CheckpointError(f"{text}{needed_plugins(registry, table)}") from error

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
        named = recipe.mixture() if source is None else source
        if not named:
            raise MFuserError(
                f"recipe '{recipe_name}' names no source: give --source, e.g. --source gta"
            )
        found: dict[str, Domain] = {}
        for reference in targets or recipe.targets:
            found |= {d.name: d for d in domains(registry, reference)}
        return RunSpec(
            pairing_name=pairing_name,
            recipe_name=recipe_name,
            pairing=pairing,
            recipe=recipe,
            sources=sources(registry, named),
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
