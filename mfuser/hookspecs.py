"""The plugin interface: one hook.

from mfuser import hookimpl

@hookimpl
def mfuser_components():
    return [MySpec]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from mfuser.specs import Spec

hookspec = pluggy.HookspecMarker("mfuser")
hookimpl = pluggy.HookimplMarker("mfuser")


@hookspec
def mfuser_components() -> list[type[Spec]]:
    """The components this plugin offers: spec classes, each of the base of its kind."""
    raise NotImplementedError
