"""Studies: the `[study.NAME]` tables of a registry."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from mfuser.config.declared import Declared
from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import Names, RecipeSpec
from mfuser.config.tables import flat
from mfuser.errors import suggest
from mfuser.specs import ImageSize, Options

ALTERNATIVE = ("label", "set", "pairing", "recipe")
"""Keys of a labeled axis value that changes more than one key."""


class PaperReference(Options):
    """The published figures that belong to the variants.

    table: number of the paper's table. rows: label of a variant -> row of the table; left out, the
    labels are the rows.
    """

    table: int
    rows: dict[str, str] | None = None


class StudySpec(Declared):
    """A grid of pairings, each trained with every seed and tested on the targets.

    base: the pairing that is varied. settings: laid over it in every variant.
    recipe, recipe_settings: how each is trained. source, targets: None: the recipe's; source as
        --source takes it.
    seeds: each variant is trained once with each.
    axes: what is varied -> its values; every combination is a variant. An axis is
        a key of the pairing ("fusion", "fusion.every", "image_size", …),
        "recipe.KEY" for one of the recipe's,
        "pairing" or "recipe" for whole ones by name,
        or any other name, if each value is {label = "…", set = {…}}.
        Such a labeled value may stand in every axis: `set` is laid over the pairing, `recipe`
        over the recipe, `pairing` names another base.
    reference: label of the variant that the others are compared with; None: the best.
    """

    kind: Literal["training"] = "training"
    base: str
    settings: dict[str, Any] = {}
    recipe: str = "paper"
    recipe_settings: dict[str, Any] = {}
    source: str | None = None
    targets: Names = ()
    seeds: tuple[NonNegativeInt, ...] = (0,)
    axes: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(flat)]
    reference: str | None = None
    paper: PaperReference | None = None

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError("'seeds' needs at least one number, and none twice")
        return seeds

    @field_validator("axes")
    @classmethod
    def _known(cls, axes: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        if not axes:
            raise ValueError('a study varies something: axes.fusion = ["mvfuser", "none"]')
        for axis, values in axes.items():
            if not values:
                raise ValueError(f"axis '{axis}' has no values")
            head, _, rest = axis.partition(".")
            if axis == "recipe.seed":
                raise ValueError("axis 'recipe.seed': write seeds = [0, 1, …] beside the axes")
            if head == "recipe" and rest:
                known, first = RecipeSpec.model_fields, rest.partition(".")[0]
                if first not in known:
                    raise ValueError(f"axis '{axis}': no such key{suggest(first, known)}")
            for value in values:
                _check_alternative(axis, value)
            if not is_key(axis) and not all(is_alternative(v) for v in values):
                near = suggest(head, [*PairingSpec.model_fields, "pairing", "recipe"])
                raise ValueError(
                    f"axis '{axis}' is neither a key of a pairing nor recipe.KEY{near} (an axis of "
                    "another name takes values of the form {label = …, set = {…}})"
                )
        return axes


class AdapterStudySpec(Declared):
    """Adapters measured by themselves: parameters, FLOPs, time, memory, growth. Needs no data.

    adapters: fusion components, by name or as tables. encoders: how many they join; more than two
    are several VFMs and a VLM. width: D of each. grid, prefix: patches and prefix tokens of each.
    batch: images. curve: patches per encoder at which forward
    time is taken; an adapter stops where a pass would take over `limit` seconds.
    """

    kind: Literal["adapters"] = "adapters"
    adapters: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    encoders: int = Field(default=2, ge=2)
    width: PositiveInt = 1024
    grid: ImageSize = (36, 36)
    prefix: NonNegativeInt = 1
    batch: PositiveInt = 2
    curve: tuple[PositiveInt, ...] = ()
    limit: PositiveFloat = 60.0
    paper: PaperReference | None = None


AnyStudy = StudySpec | AdapterStudySpec

KINDS: dict[str, type[AnyStudy]] = {"training": StudySpec, "adapters": AdapterStudySpec}


def is_key(axis: str) -> bool:
    """Whether an axis names what its values are laid over, so that plain values will do."""
    head = axis.partition(".")[0]
    return axis == "pairing" or head == "recipe" or head in PairingSpec.model_fields


def is_alternative(value: Any) -> bool:
    """Whether an axis value is labeled and says itself what it changes."""
    return isinstance(value, dict) and "label" in value and "name" not in value


def _check_alternative(axis: str, value: Any) -> None:
    if not is_alternative(value):
        return
    unknown = [k for k in value if k not in ALTERNATIVE]
    if unknown:
        raise ValueError(
            f"axis '{axis}', {value['label']!r}: there is no such key '{unknown[0]}'; a labeled "
            f"value has {', '.join(ALTERNATIVE)}"
        )
    for key, wanted in (("label", str), ("set", dict), ("pairing", str), ("recipe", dict)):
        if key in value and not isinstance(value[key], wanted):
            what = {str: "text", dict: "a table"}[wanted]
            raise ValueError(f"axis '{axis}': '{key}' is {what}, not {value[key]!r}")
