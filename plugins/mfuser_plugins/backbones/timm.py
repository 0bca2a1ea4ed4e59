"""Vision transformers of the timm library: DINOv2, DINOv3, EVA02, BEiT v2, DeiT, SigLIP, …"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from mfuser import MFuserError, VisionSpec, WeightsError, hookimpl
from mfuser.errors import suggest
from mfuser.specs import BackboneInfo, Size
from mfuser_plugins.backbones._miniature import known
from mfuser_plugins.backbones._options import LibrarySpec
from mfuser_plugins.backbones._resample import Resampling
from mfuser_plugins.backbones._stepping import freeze
from mfuser_plugins.backbones._weights import (
    RANDOM,
    Tensors,
    hub_file,
    load_file,
    local_file,
    url_file,
)

if TYPE_CHECKING:
    from mfuser_plugins.backbones._timm import TimmBackbone


class TimmSpec(LibrarySpec, VisionSpec, name="timm"):
    """A vision transformer of the timm library: ViT, EVA, DINOv3, BEiT, SAM, NaFlex, CaiT, XCiT, …

    Of staged models (Swin, Swin v2, ConvNeXt, Hiera) the longest stage is used: the stages before
    it produce the tokens, those after it are dropped. `mfuser list backbones --all` lists
    the models.

    model: timm's name, with or without a tag: "vit_large_patch14_dinov2.lvd142m".
    weights: None: those of the tag in `model` (or timm's default tag), from the hub or its cache.
        Else a tag ("mini-vfm" ships, for "vit_mini_patch8"), a local file (.safetensors, .pth,
        .pt; timm's or the official names), or "random".
    depth: keep the first blocks only.
    dtype: the precision that the frozen weights are held in and the blocks work in: "bfloat16"
        halves the memory. Adapters, low-rank updates and decoder stay in single precision.
    interpolation, antialias: how positions are resampled. Bicubic without antialiasing is what
        DINOv2 and the released models use; timm itself antialiases. NaFlex and the encoders of
        language models resample by themselves, as published.
    patch_resample: how the patch kernel is resampled: like an image, as the released models, or
        "pinv", FlexiViT's pseudo-inverse.
    mean, std: image statistics; None: those of the tag.
    options: passed to timm.create_model, e.g. {depth = 4, embed_dim = 96, num_heads = 3}.
    """

    tiny: ClassVar[Mapping[str, Any]] = {
        "model": "vit_tiny_patch16_224",
        "weights": "random",
        "options": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    }

    depth: PositiveInt | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _trains_in_single(self) -> TimmSpec:
        if self.dtype != "float32" and not self.freeze:
            raise ValueError(
                f'dtype = "{self.dtype}" is for frozen weights: training would lose its small '
                "steps; leave it out, or freeze"
            )
        return self

    @classmethod
    def catalog(cls) -> list[BackboneInfo]:
        from mfuser_plugins.backbones.catalog import listed

        return listed("timm")

    def build(self, image_size: Size) -> TimmBackbone:
        """Raises WeightsError for weights that are missing or do not fit, MFuserError otherwise."""
        from mfuser_plugins.backbones._timm import TimmBackbone
        from mfuser_plugins.backbones._timm_families import stepper_class

        name, file = self._named()
        check_name(name)
        if file is not None:
            known().check_world(file)
        source = None
        if self.weights != RANDOM:
            source = file or published(name)
        model = create(name, self.options)
        family = stepper_class(model, name)
        if source is not None:
            load(model, source, name, str(self.weights) if file else name)
        cfg = model.pretrained_cfg
        model = family.strip(model)
        freeze(model, self.freeze)
        how = Resampling(self.interpolation, self.antialias, self.patch_resample)
        stepper = family(model, how)
        if self.depth is not None:
            if self.depth > stepper.depth:
                raise MFuserError(
                    f"depth = {self.depth}: timm model '{name}' has {stepper.depth} blocks"
                )
            family.keep(model, self.depth)
            stepper = family(model, how)
        backbone = TimmBackbone(model, stepper)
        backbone.resize(image_size, self.patch_size)
        backbone.set_statistics(self.mean or cfg["mean"], self.std or cfg["std"])
        backbone.license = self.license()
        if self.dtype != "float32":
            backbone.narrow(getattr(torch, self.dtype))
        return backbone

    def _named(self) -> tuple[str, Path | None]:
        """timm's name, with the weights' tag if one is given, and the local file if one is."""
        if self.weights in (None, RANDOM):
            return self.model, None
        if file := local_file(self.weights):
            return self.model, file
        architecture, _, tag = self.model.partition(".")
        if tag not in ("", self.weights):
            raise MFuserError(
                f"model = \"{self.model}\" names the weights '{tag}', and weights = "
                f'"{self.weights}" others: leave one of the two out'
            )
        return f"{architecture}.{self.weights}", None

    def license(self) -> str | None:
        """As timm states it; None for random weights without a tag and for local files."""
        import timm

        known()
        try:
            name, file = self._named()
            tagged = self.weights != RANDOM or "." in name
            cfg = timm.get_pretrained_cfg(name) if file is None and tagged else None
        except (RuntimeError, MFuserError):  # no such tag or file: for build() to say
            return None
        return cfg.license if cfg else None


def check_name(name: str) -> None:
    """Raises MFuserError for a model that timm does not know, WeightsError for an unknown tag."""
    import timm

    known()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise MFuserError(
            f"timm has no model '{architecture}'{suggest(architecture, timm.list_models())}"
        )
    tags = [t.partition(".")[2] for t in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise WeightsError(f"timm has no weights '{tag}' for '{architecture}'{suggest(tag, tags)}")


def create(name: str, options: dict[str, Any]) -> Any:
    """timm.create_model without weights and classifier; MFuserError for what it cannot build."""
    import timm

    try:
        return timm.create_model(name, pretrained=False, **{"num_classes": 0, **options})
    except Exception as error:
        raise MFuserError(
            f"timm cannot build '{name}' with options {options}: {type(error).__name__}: {error}"
        ) from error


def published(name: str) -> Path:
    """The file that timm publishes for a model, from a cache or downloaded."""
    import timm

    found = timm.get_pretrained_cfg(name)
    cfg: dict[str, Any] = found.to_dict() if found is not None else {}
    what = f"timm model '{name}'"
    if file := cfg.get("file"):
        return cast(Path, known().shipped(Path(file)))
    if repository := cfg.get("hf_hub_id"):
        given = cfg.get("hf_hub_filename")
        return hub_file(
            repository, [given] if given else ["model.safetensors", "pytorch_model.bin"], what
        )
    if url := cfg.get("url"):
        return url_file(url, what)
    raise WeightsError(
        f"timm publishes no weights for '{name}'; name a tag that has some, give a local file "
        f'(weights = "path"), or say weights = "{RANDOM}"'
    )


PUBLISHED = (
    "visual.class_embedding",
    "image_encoder.patch_embed.proj.weight",
    "downsample_layers.0.0.weight",
)
"""Names by which CLIP's, SAM's and ConvNeXt's own files are recognized; timm converts them."""


def load(model: Any, path: Path, name: str, weights: str) -> None:
    """A file in timm's or an official naming -> the model. Raises WeightsError on any misfit."""
    from mfuser_plugins.backbones._timm import SPARE
    from mfuser_plugins.backbones._timm_families import stepper_class

    family = stepper_class(model, name)

    def convert(tensors: Tensors) -> Tensors:
        if family.has_table and family.any_prefix:
            _adopt_size(model, tensors)
        try:
            return family.convert(tensors, model)
        except Exception as error:
            raise WeightsError(
                f"'{weights}' does not fit timm model '{name}': its {len(tensors)} tensors "
                f"({', '.join(list(tensors)[:3])}, …) are of another architecture"
            ) from error

    what = f"timm model '{name}'"
    load_file(model, path, what, weights, convert, published=PUBLISHED, spare=SPARE)


def _adopt_size(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the model the grid and patch size of a file saved at another size.

    timm's converters would resample silently, in timm's convention; `resize` does it in ours.
    """
    from timm.layers import PatchEmbed

    kernel, table = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    sized: Any = model
    embed, own = sized.patch_embed, sized.pos_embed
    if kernel is None or table is None or own is None or not isinstance(embed, PatchEmbed):
        return
    if kernel.dim() != 4 or table.dim() != 3 or table.shape[2] != own.shape[2]:
        return
    prefix = own.shape[1] - math.prod(embed.grid_size)
    side = math.isqrt(max(table.shape[1] - prefix, 0))
    patch = tuple(kernel.shape[-2:])
    if table.shape == own.shape and patch == tuple(embed.patch_size):
        return
    if side > 0 and side * side == table.shape[1] - prefix:
        sized.set_input_size(img_size=(side * patch[0], side * patch[1]), patch_size=patch)


@hookimpl
def mfuser_components() -> list[type[VisionSpec]]:
    return [TimmSpec]
