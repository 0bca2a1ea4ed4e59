"""Models of Hugging Face's transformers: DINOv2, DINOv3, ViT, DeiT, CLIP, SigLIP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PositiveInt

from mfuser import MFuserError, VisionLanguageSpec, VisionSpec, WeightsError, hookimpl
from mfuser.errors import suggest
from mfuser.specs import BackboneInfo, BackboneSpec, Size
from mfuser_plugins.backbones._options import HuggingFaceSpec, Statistics
from mfuser_plugins.backbones._resample import Resampling
from mfuser_plugins.backbones._stepping import Stepped, freeze
from mfuser_plugins.backbones._weights import RANDOM

if TYPE_CHECKING:
    from mfuser_plugins.backbones._hf import HuggingFaceBackbone
    from mfuser_plugins.backbones._hf_pair import PairBackbone

_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY_DINOV2 = {"model_type": "dinov2", "patch_size": 16, "image_size": 64, "mlp_ratio": 2, **_TINY}
_TINY_CLIP = {
    "model_type": "clip",
    "projection_dim": 24,
    "vision_config": {"patch_size": 16, "image_size": 64, "intermediate_size": 64, **_TINY},
    "text_config": {"intermediate_size": 64, **_TINY},
}


class HuggingFaceVisionSpec(HuggingFaceSpec, VisionSpec, name="transformers"):
    """A vision transformer of transformers: DINOv2, DINOv3, ViT, MAE, BEiT, SigLIP, CLIP, …

    The types are listed by `mfuser list backbones --all`; of CLIP, MetaCLIP 2, SigLIP, SigLIP 2
    and AIMv2 it is the image tower.

    model: a folder made by save_pretrained, a name of the Hugging Face hub, or "random".
    weights: None: those of `model`. Else a local file of that architecture, or "random".
    config: of model = "random": {model_type = "dinov2", hidden_size = 96, …}.
    depth: keep the first blocks only.
    patch_resample: how the patch kernel is resampled: like an image, or "pinv" (FlexiViT).
    mean, std: image statistics; None: those of the model's preprocessor_config.json.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"model": "random", "config": _TINY_DINOV2}

    depth: PositiveInt | None = None

    @classmethod
    def catalog(cls) -> list[BackboneInfo]:
        from mfuser_plugins.backbones._hf import LAYOUTS

        return [BackboneInfo(kind, tried=True) for kind in LAYOUTS]

    def build(self, image_size: Size) -> HuggingFaceBackbone:
        """Raises WeightsError for weights that are missing or do not fit, MFuserError otherwise."""
        from mfuser_plugins.backbones._hf import HuggingFaceBackbone
        from mfuser_plugins.backbones._hf import stepper as stepper_of
        from mfuser_plugins.backbones._hf_pair import PAIRS

        model = load(self.model, self.config, self.weights)
        if model.config.model_type in (*PAIRS, "aimv2"):
            model = model.vision_model
        stepper = stepper_of(model, Resampling(patch=self.patch_resample))
        if self.depth is not None:
            if self.depth > stepper.depth:
                raise MFuserError(
                    f"depth = {self.depth}: '{self.model}' has {stepper.depth} blocks"
                )
            del stepper.layers[self.depth :]
            stepper.depth = self.depth
        backbone = HuggingFaceBackbone(model, stepper)
        _prepare(backbone, self, image_size)
        return backbone


class HuggingFacePairSpec(HuggingFaceSpec, VisionLanguageSpec, name="transformers"):
    """CLIP, MetaCLIP 2, SigLIP or SigLIP 2 of transformers.

    model: a folder made by save_pretrained, a name of the Hugging Face hub, or "random".
    weights: None: those of `model`. Else a local file of that architecture, or "random".
    config: of model = "random": {model_type = "clip", projection_dim = 64, vision_config = {…},
        text_config = {…}}.
    tokenizer: a folder or hub name, or "simple" for CLIP's, which ships with open_clip; None: the
        model's own.
    patch_resample: how the patch kernel is resampled: like an image, or "pinv" (FlexiViT).
    mean, std: image statistics; None: those of the model's preprocessor_config.json.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"model": "random", "config": _TINY_CLIP}

    tokenizer: str | None = None

    @classmethod
    def catalog(cls) -> list[BackboneInfo]:
        from mfuser_plugins.backbones._hf_pair import PAIRS

        return [BackboneInfo(kind, tried=True) for kind in PAIRS]

    def build(self, image_size: Size) -> PairBackbone:
        """Raises WeightsError for weights that are missing or do not fit, MFuserError otherwise."""
        from mfuser_plugins.backbones._hf import stepper as stepper_of
        from mfuser_plugins.backbones._hf_pair import PAIRS
        from mfuser_plugins.backbones._text_hf import Tokenizer

        model = load(self.model, self.config, self.weights)
        family = PAIRS.get(model.config.model_type)
        if family is None:
            raise MFuserError(
                f"'{self.model}' is of type '{model.config.model_type}', which has no text tower "
                f"that is supported here (there is: {', '.join(PAIRS)}); as a VFM it may serve, "
                'and with a text encoder of its own as vision of name = "dual_encoder"'
            )
        stepper = stepper_of(model.vision_model, Resampling(patch=self.patch_resample))
        source = self.tokenizer or ("simple" if self.model == RANDOM else self.model)
        vocabulary = int(model.config.text_config.vocab_size)
        backbone = family(model, stepper, Tokenizer(source, vocabulary))
        _prepare(backbone, self, image_size)
        if backbone.alignment == "softmax":
            # The alignment loss of softmax models brings its own temperature.
            model.logit_scale.requires_grad_(False)
        return backbone


def load(source: str, config: dict[str, Any], weights: str | None) -> Any:
    """A model of a folder, a hub name or ("random") a configuration, with the weights asked for.

    Raises WeightsError for weights that are missing or do not fit, MFuserError otherwise.
    """
    from mfuser_plugins.backbones._hub import from_config, load_pretrained, quiet, transformers

    package = transformers(f"transformers model '{source}'")
    with quiet():
        if source != RANDOM:
            if config:
                raise MFuserError(f"'config' is for model = \"{RANDOM}\"; '{source}' has its own")
            return load_pretrained(source, "AutoModel", weights)[0]
        options = dict(config)
        kind = options.pop("model_type", None)
        if kind is None:
            raise MFuserError(f'model = "{RANDOM}" needs config = {{model_type = "…", …}}')
        try:
            made = package.AutoConfig.for_model(kind, **options)
        except Exception as error:
            raise _unbuildable(kind, config, error) from error
        try:
            return from_config(made, "AutoModel", str(kind), weights or RANDOM)
        except WeightsError:
            raise
        except MFuserError as error:
            raise _unbuildable(kind, config, error.__cause__ or error) from error


def _unbuildable(kind: Any, config: dict[str, Any], error: BaseException) -> MFuserError:
    from mfuser_plugins.backbones._hf import LAYOUTS

    known = suggest(str(kind), [*LAYOUTS, "clip", "siglip", "siglip2", "metaclip_2"])
    return MFuserError(
        f"transformers cannot build config = {config}: {type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}{known}"
    )


def _prepare(backbone: Stepped, spec: HuggingFaceSpec, image_size: Size) -> None:
    """Freeze, resize, and give a backbone the statistics of its weights."""
    freeze(backbone, spec.freeze)
    for name, parameter in backbone.named_parameters():
        if name.endswith("mask_token"):
            # Only masked pre-training reads it.
            parameter.requires_grad_(False)
    backbone.resize(image_size, spec.patch_size)
    mean, std = spec.mean, spec.std
    if mean is None or std is None:
        # Random weights have none, and a layout must not depend on further files.
        own = _statistics(RANDOM if spec.weights == RANDOM else spec.model)
        mean, std = mean or own[0], std or own[1]
    backbone.set_statistics(mean, std)


def _statistics(source: str) -> tuple[Statistics, Statistics]:
    if source == RANDOM:
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    name = "preprocessor_config.json"
    try:
        folder = Path(source).expanduser()
        if folder.is_dir():
            file = folder / name
        else:
            from mfuser_plugins.backbones._weights import hub_file

            file = hub_file(source, [name], f"'{source}'")
        content = json.loads(file.read_text())
        return tuple(content["image_mean"]), tuple(content["image_std"])
    except (OSError, ValueError, KeyError, WeightsError) as error:
        raise WeightsError(
            f"'{source}' has no {name} with image_mean and image_std, and statistics are never "
            "guessed: give mean = […], std = […]"
        ) from error


@hookimpl
def mfuser_components() -> list[type[BackboneSpec]]:
    return [HuggingFaceVisionSpec, HuggingFacePairSpec]
