"""Tiny partners: every installed component at the size its spec declares as `tiny`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from mfuser.config.pairing import PairingSpec
from mfuser.errors import MFuserError
from mfuser.interfaces import IGNORE
from mfuser.plugins.components import Component, Components
from mfuser.specs import DecoderSpec, Spec

IMAGE = (48, 80)
"""(height, width) of the images that tiny pairings see: neither square nor a power of two."""

CLASSES = ("road", "sky", "car")

ROLES = {
    "vision": "vfm",
    "vision_language": "vlm",
    "fusion": "fusion",
    "tuning": "tuning",
    "enhancer": "enhancer",
    "decoder": "decoder",
    "loss": "losses",
}
OPTIONAL = ("tuning", "loss")
"""Kinds of which a pairing may have none."""


def tiny(spec: type[Spec], components: Components, **options: Any) -> Spec:
    """The spec of a component at its tiny options. Raises ValidationError where they do not do."""
    given = {"name": spec.component(), **spec.tiny, **options}
    return spec.model_validate(given, context={"components": components})


def usable(component: Component, components: Components) -> bool:
    """Whether a component can stand in as a partner: its tiny options are complete."""
    try:
        tiny(component.spec, components)
    except ValidationError:
        return False
    return True


def partners(kind: str, components: Components) -> dict[str, Spec]:
    """Name -> tiny spec of the installed components of a kind."""
    return {
        name: tiny(c.spec, components)
        for name, c in components.kind(kind).items()
        if usable(c, components)
    }


def pairing(components: Components, **parts: Any) -> PairingSpec:
    """A tiny pairing of `parts` and, for what is not named, the plainest partner installed.

    Raises MFuserError if a kind has no partner.
    """
    given: dict[str, Any] = {"image_size": IMAGE, "classes": CLASSES, **parts}
    given.setdefault("pyramid", {"width": 16})
    given.setdefault("prompt", {"context": 2})
    for kind, role in ROLES.items():
        if role not in given and kind not in OPTIONAL:
            given[role] = _plainest(kind, components)
    decoder = given["decoder"]
    if given["vlm"] in (None, "none") and isinstance(decoder, Spec) and "decoder" not in parts:
        given["decoder"] = _plainest("decoder", components, needs_text=False)
    return PairingSpec.model_validate(given, context={"components": components})


def _plainest(kind: str, components: Components, needs_text: bool | None = None) -> Spec:
    found = partners(kind, components)
    if kind == "decoder":
        # Text-free ones that read the pyramid fit every pairing.
        found = dict(sorted(found.items(), key=lambda item: _demands(item[1])))
    if not found:
        raise MFuserError(f"no {kind} component is installed that could be the partner")
    return found.get("none") or next(iter(found.values()))


def _demands(decoder: Spec) -> tuple[bool, int]:
    assert isinstance(decoder, DecoderSpec)
    return decoder.needs_text, decoder.joins()


def pairings(spec: Spec, components: Components) -> Iterator[tuple[str, PairingSpec]]:
    """Tiny pairings of a component with every installed partner of every other kind, each once.

    For fusion, every VFM meets every VLM.
    """
    role = ROLES[spec.kind]
    if spec.kind == "loss":
        for name, decoder in partners("decoder", components).items():
            yield f"decoder {name}", pairing(components, losses=(spec,), decoder=decoder)
        return
    base: dict[str, Any] = {role: spec}
    if role == "fusion":
        for v, vfm in partners("vision", components).items():
            for t, vlm in partners("vision_language", components).items():
                yield f"vfm {v}, vlm {t}", pairing(components, vfm=vfm, vlm=vlm, **base)
        for t, vlm in partners("vision_language", components).items():
            yield f"vfm and vlm {t}", pairing(components, vfm=vlm, vlm=vlm, **base)
        if getattr(spec, "any_number", False):
            two = list(partners("vision", components).values())[:2]
            two = (two * 2)[:2]
            yield "two vfms and a vlm", pairing(components, vfm=two, **base)
            yield "two vfms", pairing(components, vfm=two, vlm=None, **base)
        if getattr(spec, "single_tower", False):
            yield "vfm alone", pairing(components, vlm=None, **base)
            yield "vlm alone", pairing(components, vfm=None, **base)
    if spec.kind == "vision_language":
        yield "vlm alone", pairing(components, vfm=None, **base)
        yield "as vfm too", pairing(components, vfm=spec, **base)
    if spec.kind == "vision":
        yield "vfm alone", pairing(components, vlm=None, **base)
    if spec.kind == "decoder" and not getattr(spec, "needs_text", False):
        yield "no vlm", pairing(components, vlm=None, **base)
    for kind, other in ROLES.items():
        if other in (role, "losses") or (
            role == "fusion" and kind in ("vision", "vision_language")
        ):
            continue
        for name, partner in partners(kind, components).items():
            decoder = partner if kind == "decoder" else spec
            if "enhancer" in (role, other) and isinstance(decoder, DecoderSpec) and decoder.joins():
                enhancer = partner if kind == "enhancer" else spec
                if enhancer.name != "none":  # refused: it reads what comes after the blocks
                    continue
            yield f"{other} {name}", pairing(components, **base, **{other: partner})


def labels_for(batch: int, size: tuple[int, int], classes: int) -> Any:
    """Label maps (B, H, W) int64: every class, and pixels of none."""
    import torch

    maps = torch.arange(size[0] * size[1]).view(size) // 7 % (classes + 1)
    maps = torch.where(maps == classes, torch.tensor(IGNORE), maps)
    return maps.expand(batch, -1, -1).clone()


@functools.cache
def everything() -> Components:
    """The installed components."""
    from mfuser.plugins.discovery import installed_components

    return installed_components()
