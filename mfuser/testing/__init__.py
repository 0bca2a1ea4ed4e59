"""The conformance suite: the requirements on components of each kind.

    from mfuser.testing import conforms

    def test_conforms():
        conforms(MySpec)

`mfuser plugin check MODULE` runs the same. A check builds the component at its spec's `tiny`
options, alone and in pairings with every installed partner, and says of each failure what was
tried, what was got, what is expected and what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mfuser.errors import MFuserError, PluginError
from mfuser.plugins.components import Component, Components
from mfuser.specs import DatasetSpec, InferenceSpec, Spec
from mfuser.testing import datasets, kinds, modules, partners, process, specs
from mfuser.testing.partners import everything, tiny
from mfuser.testing.stand_ins import BENCHES
from mfuser.testing.trial import asked, trial
from mfuser.testing.verdict import Report, Verdict, judge

__all__ = ["Report", "Verdict", "check_component", "check_plugin", "conforms"]

Check = tuple[str, Callable[[], str]]

FOR_EVERY_MODULE = (
    ("shapes at odd sizes", modules.odd_shapes),
    ("determinism", modules.deterministic),
    ("training and evaluation", modules.modes),
    ("state dict", modules.state_dict),
    ("dtypes", modules.dtypes),
    ("devices", modules.devices),
    ("gradients", modules.gradients),
    ("global state", process.builds),
)
FOR_BACKBONES = (
    ("frozen", kinds.frozen),
    ("image sizes", kinds.resizing),
    ("further tokens", kinds.further_tokens),
)
FOR_DECODERS = (("losses", kinds.losses),)
FOR_LOSSES = (("losses", kinds.losses), ("what it teaches", kinds.reaches))
FOR_DATASETS = (
    ("samples", datasets.samples),
    ("names and classes", datasets.consistent),
    ("repeatable", datasets.repeatable),
    ("missing data", datasets.missing_data),
    ("as a target", datasets.expands),
)


def check_component(
    spec: type[Spec],
    *,
    options: dict[str, Any] | None = None,
    root: Path | None = None,
    components: Components | None = None,
    pairings: int | None = None,
) -> Report:
    """Every check of a component.

    options: in place of its `tiny` ones, key by key. root: where a dataset's files lie; None:
    those that `write_example` writes. components: partners; None: what is installed.
    pairings: at most so many pairings, spread over the partners; None: all.
    """
    components = _with(spec, components or everything())
    given = options or {}
    report = Report(spec.kind, spec.component())

    def tried(checks: Iterable[Check]) -> None:
        report.verdicts += judge(checks, spec)

    tried(
        [
            ("name", partial(specs.has_its_name, spec, components)),
            ("help", partial(specs.has_help, spec)),
            ("tiny options", partial(specs.has_tiny, spec, components, given)),
        ]
    )
    try:
        made = tiny(spec, components, **given)
    except ValidationError:
        return report
    tried(
        [
            ("spec as JSON", partial(specs.resolves, made, components)),
            ("unknown options", partial(specs.refuses_unknown_keys, made, components)),
            ("import", partial(process.imports, spec, components)),
        ]
    )
    if isinstance(made, DatasetSpec):
        data = datasets.DatasetBench(made, root)
        try:
            tried((n, partial(c, data)) for n, c in FOR_DATASETS)
        finally:
            data.close()
        return report
    tried(_of_module(made, components))
    tried(_spread(list(_in_pairings(made, components)), pairings))
    return report


def conforms(spec: type[Spec], **arguments: Any) -> Report:
    """`check_component`, as a test: raises AssertionError that lists what failed, and the fixes."""
    report = check_component(spec, **arguments)
    if not report.passed:
        failed = "\n".join(str(v) for v in report.failed) or "nothing could be tried"
        raise AssertionError(f"{report.kind} '{report.name}' does not conform:\n{failed}")
    return report


def check_plugin(
    name: str, roots: dict[str, Path] | None = None, pairings: int | None = None
) -> list[Report]:
    """Every check of every component that a plugin offers.

    name: a module, a .py file, or an installed plugin by the name of its entry point.
    roots: folders of datasets, by name. pairings: as in `check_component`.

    Raises PluginError if the plugin cannot be loaded or offers nothing.
    """
    components, offered = plugin_components(name)
    return [
        check_component(
            c.spec, root=(roots or {}).get(c.name), components=components, pairings=pairings
        )
        for c in offered
    ]


def plugin_components(name: str) -> tuple[Components, list[Component]]:
    """All components, with the plugin `name` loaded, and those of that plugin."""
    from mfuser.plugins.discovery import load_components, offered_by

    # Its name may be taken: that is a finding, and the rest is checked all the same.
    components = load_components(prefer=name)
    broken = [b for b in components.broken if b.plugin.split(" ")[0] == name]
    if broken:
        raise PluginError(f"plugin '{broken[0].plugin}' cannot be used: {broken[0].cause}")
    found = [c for c in components if c.plugin == name]
    if not found:
        components = load_components([name], prefer=name)
        own = offered_by(name)
        found = [c for c in components if c.spec in own]
    if not found:
        raise PluginError(f"plugin '{name}' offers no component")
    return components, found


def _of_module(spec: Spec, components: Components) -> Iterator[Check]:
    bench = BENCHES[spec.kind](spec)
    checks = [*FOR_EVERY_MODULE]
    if spec.kind in ("vision", "vision_language"):
        checks += [*FOR_BACKBONES]
    if spec.kind == "decoder":
        checks += [*FOR_DECODERS]
    if spec.kind == "loss":  # a sample alone has another loss than the same among others
        checks = [check for check in checks if check[1] is not modules.modes] + [*FOR_LOSSES]
    yield from ((name, partial(check, bench)) for name, check in checks)
    yield "bad options", partial(specs.refuses_bad_values, spec, components)


def _in_pairings(spec: Spec, components: Components) -> Iterator[Check]:
    try:
        if isinstance(spec, InferenceSpec):
            for name, decoder in partners.partners("decoder", components).items():
                pairing = partners.pairing(components, decoder=decoder)
                yield f"with decoder {name}", partial(asked, spec, pairing)
            return
        for what, pairing in partners.pairings(spec, components):
            yield f"with {what}", partial(trial, pairing, spec.kind)
    except (MFuserError, ValidationError) as error:
        yield "in a pairing", partial(_refused, error)


def _spread(checks: list[Check], most: int | None) -> list[Check]:
    """At most so many of the checks, at equal distances."""
    if most is None or most >= len(checks):
        return checks
    return [checks[(2 * i + 1) * len(checks) // (2 * most)] for i in range(most)]


def _refused(error: Exception) -> str:
    """A tiny pairing of the component and installed partners"""
    raise error


def _with(spec: type[Spec], components: Components) -> Components:
    """The components, and this one if it is not among them; its name may be taken."""
    if any(c.spec is spec for c in components):
        return components
    own = Component(spec.kind, spec.component(), spec, spec.__module__)
    return Components(
        [*components, own], components.broken, components.loaded, prefer=spec.__module__
    )
