"""What components promise each other, held to while the model runs.

The checks compare a handful of integers per block. What breaks a promise is named: component,
plugin, what it was given, what it returned, what is expected.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from mfuser.errors import MFuserError, PluginError
from mfuser.specs import Spec

T = TypeVar("T")
_ORIGIN = "_mfuser_component"


def origin(spec: Spec) -> str:
    """ "fusion 'swap' (plugin my_package.swap)"."""
    kind = spec.kind.replace("_", "-")
    return f"{kind} '{spec.component()}' (plugin {type(spec).__module__})"


def built(spec: Spec, expected: type[T], build: Callable[[], Any], optional: bool = False) -> T:
    """What `build`, a call of the spec's own build, returns: an `expected`, marked with its origin.

    Raises PluginError naming the component if it raises or returns anything else.
    """
    try:
        module = build()
    except MFuserError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(
            f"{origin(spec)}: build() raised {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})"
        ) from error
    if optional and module is None:
        return module  # type: ignore[return-value]
    if not isinstance(module, expected):
        raise PluginError(
            f"{origin(spec)}: build() returned {_shown(module)}, not a {expected.__name__}; "
            f"subclass mfuser.{expected.__name__} and return an instance of it"
        )
    if isinstance(module, nn.Module):
        setattr(module, _ORIGIN, origin(spec))
    return module


def named(module: nn.Module) -> str:
    """The component a module was built by, or its class."""
    known = getattr(module, _ORIGIN, None)
    return str(known or f"{type(module).__name__} ({type(module).__module__})")


def expect(module: nn.Module, what: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """`value`, which is a tensor of this shape; else a PluginError that names the module."""
    if isinstance(value, Tensor) and value.shape == shape:
        return value
    came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else _shown(value)
    raise PluginError(f"{named(module)}: {what} has {came}, and {tuple(shape)} is expected")


def _shown(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
