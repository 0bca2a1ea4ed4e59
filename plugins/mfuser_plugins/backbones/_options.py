"""Options that several backbone components have."""

from __future__ import annotations

from typing import Any

from mfuser.specs import BackboneSpec
from mfuser_plugins.backbones._resample import Interpolation, PatchResample

Statistics = tuple[float, float, float]


class KernelSpec(BackboneSpec):
    """patch_resample: of the patch kernel. mean, std: image statistics."""

    patch_resample: PatchResample = "bicubic"
    mean: Statistics | None = None
    std: Statistics | None = None


class LibrarySpec(KernelSpec):
    """A model of a library by name. options: changes of its configuration. interpolation,
    antialias: of position tables."""

    model: str
    interpolation: Interpolation = "bicubic"
    antialias: bool = False
    options: dict[str, Any] = {}


class HuggingFaceSpec(KernelSpec):
    """A model of transformers. config: of model = "random"."""

    model: str
    config: dict[str, Any] = {}
