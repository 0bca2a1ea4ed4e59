"""Checks of what components build and return, made while the model is assembled and runs.

They compare a handful of integers per block. An error names the component, its plugin, what it
returned and what is expected.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from mfuser.errors import MFuserError, PluginError, PluginWarning
from mfuser.inference import Inference
from mfuser.interfaces import VisionBackbone, VisionLanguageBackbone
from mfuser.plugins.blame import place
from mfuser.plugins.containment import contained
from mfuser.specs import Spec

T = TypeVar("T")
DECLARED = ("embed_dim", "depth", "num_prefix_tokens", "patch_size", "image_size", "grid")
"""Attributes that every vision backbone sets."""
DECLARED_TEXT = ("text_dim", "context_dim")
"""Attributes that a vision-language backbone sets as well."""
_ORIGIN = "_mfuser_component"


def origin(spec: Spec) -> str:
    """ "fusion 'swap' (plugin my_package.swap)"."""
    kind = spec.kind.replace("_", "-")
    return f"{kind} '{spec.component()}' (plugin {type(spec).__module__})"


def undisturbed(spec: Spec, build: Callable[[], T]) -> T:
    """The result of calling the spec's own `build`; what that changes in the process is put back.

    The changes are named by a PluginWarning.
    """
    with contained(draws=True) as changes:
        result = build()
    if changes:
        warnings.warn(
            f"{origin(spec)}: build() changed {', '.join(changes)}; it was put back",
            PluginWarning,
            stacklevel=2,
        )
    return result


def built(
    spec: Spec, expected: Callable[..., T], build: Callable[[], Any], optional: bool = False
) -> T:
    """The result of calling the spec's own `build`: an `expected`, marked with its origin.

    optional: None will do too. Raises PluginError that names the component, and the line of it
    that raised, if it raises or returns anything else.
    """
    try:
        module = undisturbed(spec, build)
    except MFuserError:
        raise
    except Exception as error:
        raise PluginError(
            f"{origin(spec)}: build() raised {type(error).__name__}: {error} "
            f"({place(error, type(spec))})"
        ) from error
    if optional and module is None:
        return module  # type: ignore[return-value]
    assert isinstance(expected, type)
    if not isinstance(module, expected):
        name = expected.__name__
        wanted = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
        raise PluginError(
            f"{origin(spec)}: build() returned {_shown(module)}, not {wanted}; subclass "
            f"mfuser.{name} and return an instance of it"
        )
    if isinstance(module, nn.Module | Inference):
        setattr(module, _ORIGIN, origin(spec))
    return cast(T, module)


def complete(backbone: VisionBackbone) -> None:
    """Raises PluginError for a backbone that does not set the attributes it has to."""
    text = isinstance(backbone, VisionLanguageBackbone)
    missing = [n for n in DECLARED + DECLARED_TEXT * text if not hasattr(backbone, n)]
    if missing:
        raise PluginError(f"{named(backbone)}: its __init__ does not set {', '.join(missing)}")
    if not (hasattr(backbone, "mean") and hasattr(backbone, "std")):
        raise PluginError(
            f"{named(backbone)}: it has no image statistics; call set_statistics(mean, std)"
        )


def freezes(backbone: VisionBackbone, freeze: bool) -> None:
    """Raises PluginError for a backbone that trains with freeze = true or does not with false."""
    trains = [
        name
        for name, parameter in backbone.named_parameters()
        if parameter.requires_grad and not name.startswith(backbone.always_trains)
    ]
    if freeze and trains:
        raise PluginError(
            f"{named(backbone)}: freeze = true, and {len(trains)} of its tensors train, e.g. "
            f"'{trains[0]}'; its build() must call requires_grad_(not self.freeze)"
        )
    if not freeze and not trains:
        raise PluginError(
            f"{named(backbone)}: freeze = false, and nothing in it trains; its build() must call "
            "requires_grad_(not self.freeze)"
        )


def named(module: object) -> str:
    """The component a module was built by, or its class."""
    known = getattr(module, _ORIGIN, None)
    return str(known or f"{type(module).__name__} ({type(module).__module__})")


def expect(module: object, what: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """Return `value`, a tensor of this shape. Raises PluginError that names the module."""
    if isinstance(value, Tensor) and value.shape == shape:
        return value
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else _shown(value)
    raise PluginError(f"{named(module)}: {what} has {got}; {tuple(shape)} is expected")


def scalars(module: nn.Module, losses: Any, method: str = "loss()") -> dict[str, Tensor]:
    """Return `losses`, a dictionary of named scalars. Raises PluginError that names the module."""
    if not isinstance(losses, dict) or not losses:
        raise PluginError(
            f"{named(module)}: {method} returned {_shown(losses)}; a dictionary of named scalars "
            "is expected"
        )
    for name, loss in losses.items():
        expect(module, f"{method}['{name}']", loss, ())
    return losses


def _shown(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
