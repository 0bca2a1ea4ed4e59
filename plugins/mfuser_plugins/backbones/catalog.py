"""Facts about the libraries' architectures, found by laying each out (benchmarks/pairs.py)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mfuser.specs import BackboneInfo

CATALOG = Path(__file__).with_name("catalog.json")

MODULES = (
    "vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "eva", "beit",
    "vision_transformer_relpos", "vision_transformer_sam", "naflexvit", "cait", "xcit",
    "qwen3_vit", "deepseek_vit", "gemma4_vit", "swin_transformer", "swin_transformer_v2",
    "swin_transformer_v2_cr", "convnext", "hiera",
)  # fmt: skip
"""The modules of timm.models whose classes have a stepper."""


def candidates(library: str) -> list[str]:
    """Names of the architectures that may be stepped: open_clip's, timm's of `MODULES`."""
    if library == "open_clip":
        import open_clip

        return list(open_clip.list_models())
    import timm

    return [name for name in timm.list_models() if family_of("timm", name) in MODULES]


def family_of(library: str, name: str) -> str:
    """The module of timm.models, or the kind of an open_clip model's image tower."""
    if library == "timm":
        import timm

        return str(timm.model_entrypoint(name).__module__.rpartition(".")[2])
    import open_clip

    vision = open_clip.get_model_config(name)["vision_cfg"]
    if "timm_model_name" in vision:
        return f"timm {family_of('timm', vision['timm_model_name'].partition('.')[0])}"
    return "ModifiedResNet" if isinstance(vision["layers"], list) else "VisionTransformer"


@cache
def known(library: str) -> dict[str, dict[str, Any]]:
    """Architecture -> width, depth, patch, tokens, prefix, parameters, or {refused: why}."""
    content: dict[str, Any] = json.loads(CATALOG.read_text("utf-8"))
    found: dict[str, dict[str, Any]] = content.get(library, {})
    return found


def listed(library: str) -> list[BackboneInfo]:
    """The architectures of a library; those missing from the catalog were not tried."""
    found = known(library)
    licenses = {"timm": timm_licenses, "open_clip": open_clip_licenses}.get(library, dict)()
    return [entry(name, found.get(name), licenses.get(name)) for name in candidates(library)]


def entry(name: str, facts: dict[str, Any] | None, license: str | None) -> BackboneInfo:
    if facts is None:
        return BackboneInfo(name, license=license)
    if "refused" in facts:
        return BackboneInfo(name, license=license, tried=True, refused=facts["refused"])
    shown = {key: facts[key] for key in ("width", "depth", "patch", "tokens")}
    return BackboneInfo(name, license=license, tried=True, **shown)


@cache
def timm_licenses() -> dict[str, str]:
    """Architecture -> the licenses of its weights."""
    import timm

    licenses: dict[str, set[str]] = {}
    for tagged in timm.list_pretrained():
        cfg = timm.get_pretrained_cfg(tagged)
        if cfg is not None and cfg.license:
            licenses.setdefault(tagged.partition(".")[0], set()).add(cfg.license)
    return {name: ", ".join(sorted(found)) for name, found in licenses.items()}


@cache
def open_clip_licenses() -> dict[str, str]:
    """Architecture -> the licenses of its weights, as far as timm states them."""
    import open_clip

    licenses: dict[str, set[str]] = {}
    for name, tag in open_clip.list_pretrained():
        if found := open_clip_license(name, tag):
            licenses.setdefault(name, set()).add(found)
    return {name: ", ".join(sorted(found)) for name, found in licenses.items()}


def open_clip_license(model: str, tag: str) -> str | None:
    """The license timm states for the same image tower; open_clip itself states none.

    Found by the place on the hub, which many weights share with timm's; else, for a tower of
    timm's, the license of that architecture's weights if there is only one.
    """
    import open_clip
    import timm

    place = open_clip.get_pretrained_cfg(model, tag).get("hf_hub") or ""
    try:
        cfg = timm.get_pretrained_cfg(place.strip("/").removeprefix("timm/"))
    except RuntimeError:  # another tag than timm's
        cfg = None
    if cfg is not None and cfg.license:
        return str(cfg.license)
    config = open_clip.get_model_config(model) or {}
    tower = config.get("vision_cfg", {}).get("timm_model_name", "").partition(".")[0]
    license = timm_licenses().get(tower)
    return license if license and ", " not in license else None
