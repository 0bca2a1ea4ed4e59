"""Checks that a component leaves the process as it found it."""

from __future__ import annotations

import warnings

from mfuser.errors import PluginWarning
from mfuser.plugins.components import Components
from mfuser.specs import Spec
from mfuser.testing.bench import Bench
from mfuser.testing.modules import first, module_of
from mfuser.testing.verdict import Broken

LEFT = "the process as it was: what others compute must not depend on who is installed"
FIX = (
    "pass a dtype, a generator or a context manager where it is needed; weights come from torch's "
    "generator as it stands, which --seed has set"
)


def imports(spec: type[Spec], components: Components) -> str:
    """The import of the plugin"""
    plugin = {c.spec: c.plugin for c in components}[spec]
    for loaded in components.loaded:
        if loaded.plugin == plugin and loaded.changed:
            raise Broken(
                "the import of the plugin", f"it changed {', '.join(loaded.changed)}", LEFT, FIX
            )
    return "it changes nothing of the process"


def builds(bench: Bench) -> str:
    """The process before and after build()"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module_of(bench, first(bench))
    for warning in caught:
        if issubclass(warning.category, PluginWarning):
            text = str(warning.message).split(": build() ", 1)[-1].split(";")[0]
            raise Broken("build()", f"it {text}", LEFT, FIX)
    return "build() changes nothing of the process"
