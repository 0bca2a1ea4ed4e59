"""Checks of a spec: its name, help and options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from mfuser.errors import MFuserError, PluginError, brief
from mfuser.plugins.components import Components
from mfuser.specs import Spec
from mfuser.testing.partners import tiny
from mfuser.testing.stand_ins import BENCHES
from mfuser.testing.verdict import Broken, NotTried

NUMBERS = (-1, 0, 7, 1.5)
"""Values for every numeric option: below, at and beside the usual ones."""


def has_its_name(spec: type[Spec], components: Components) -> str:
    """The name, among those that are installed"""
    for clash in components.clashes:
        if clash.kept.spec is spec:
            other = clash.left_out
            raise Broken(
                f"the {other.kind} components that are installed",
                f"'{other.name}' is also offered by plugin '{other.plugin}'",
                "a name of its own: with both installed no command works",
                f'rename it: class {spec.__name__}({spec.__bases__[0].__name__}, name="…")',
            )
    return f"'{spec.component()}' is the only one of that name"


def has_help(spec: type[Spec]) -> str:
    """The docstring's first line"""
    text = (spec.__doc__ or "").strip()
    line = text.split("\n")[0].strip()
    if not text or spec.__doc__ == spec.__mro__[1].__doc__:
        raise Broken(
            f"the docstring of {spec.__name__}",
            "there is none",
            "one line for `mfuser list`, then a line per option",
            'write a line below the class: """Each encoder reads the other by attention."""',
        )
    return f'"{line}"'


def has_tiny(spec: type[Spec], components: Components, options: dict[str, Any]) -> str:
    """The spec at its `tiny` options"""
    try:
        made = tiny(spec, components, **options)
    except ValidationError as error:
        raise Broken(
            f"{spec.__name__} with its tiny options {dict(spec.tiny)}",
            brief(error),
            "a valid spec without a download",
            f"set {spec.__name__}.tiny: ClassVar = {{…}} with every required option",
        ) from error
    return f"{len(type(made).model_fields) - 1} options are valid"


def resolves(spec: Spec, components: Components) -> str:
    """The spec written out as JSON and read again"""
    table = spec.model_dump(mode="json")
    again = type(spec).model_validate(table, context={"components": components})
    if again != spec:
        changed = [n for n in type(spec).model_fields if getattr(again, n) != getattr(spec, n)]
        raise Broken(
            "the spec written out as JSON and read again",
            f"{', '.join(changed)} changed",
            "the same spec: a checkpoint rebuilds the model from what is written",
            "use types that pydantic writes and reads alike (str, int, float, tuple, Options)",
        )
    return "written out as JSON and read again, it is the same"


def refuses_unknown_keys(spec: Spec, components: Components) -> str:
    """An option that does not exist"""
    try:
        tiny(type(spec), components, no_such_option=1)
    except ValidationError:
        return "an option that does not exist"
    raise Broken(
        "{ no_such_option = 1 }",
        "it was accepted",
        "a ValidationError that names the key",
        'leave model_config alone: specs forbid what they do not know (extra="forbid")',
    )


def refuses_bad_values(spec: Spec, components: Components) -> str:
    """Every numeric option at -1, 0, 7 and 1.5, every choice at an unknown word"""
    if spec.kind not in BENCHES:
        raise NotTried("datasets are not built from unusual values")
    bench_class = BENCHES[spec.kind]
    tried = refused = 0
    for field, value in _values(type(spec)):
        tried += 1
        given = f"{field} = {value!r}"
        try:
            changed = tiny(type(spec), components, **{field: value})
        except ValidationError:
            refused += 1
            continue
        bench = bench_class(changed)
        case = next(iter(bench.cases()))
        try:
            module = bench.build(case)
            if module is not None:
                bench.call(module.eval(), bench.feed(case))
        except MFuserError as error:
            # `built` turns what build() raises into a PluginError with a cause.
            if isinstance(error, PluginError) and error.__cause__ is not None:
                raise _unrefused(given, bench.describe(case), str(error), spec) from error
            refused += 1
        except Exception as error:
            got = f"{type(error).__name__}: {str(error)[:200]}"
            raise _unrefused(given, bench.describe(case), got, spec) from error
    if not tried:
        raise NotTried("there is no numeric option and no choice")
    return f"{tried} unusual values: {refused} refused with a reason, {tried - refused} work"


def _unrefused(given: str, case: str, got: str, spec: Spec) -> Broken:
    return Broken(
        f"{given}, built and run for {case}",
        got,
        "it works, or it is refused with a reason before anything runs",
        f"narrow the field's type in {type(spec).__name__} (PositiveInt, Field(ge=0, lt=1), "
        "Literal, a model_validator), or raise MFuserError in build()",
    )


def _values(spec: type[Spec]) -> Iterator[tuple[str, Any]]:
    """(field, unusual value) for the numeric fields and choices that the spec itself adds."""
    for name, info in spec.model_fields.items():
        if name == "name":
            continue
        annotation = info.annotation
        inner = set(get_args(annotation)) if get_origin(annotation) is not Literal else set()
        if {int, float} & ({annotation} | inner):
            yield from ((name, number) for number in NUMBERS)
        elif get_origin(annotation) is Literal:
            yield name, "no such choice"
