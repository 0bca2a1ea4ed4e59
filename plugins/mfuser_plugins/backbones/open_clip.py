"""Vision-language models of the open_clip library: CLIP, EVA02-CLIP, SigLIP, SigLIP 2, …"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field, PositiveInt

from mfuser import MFuserError, VisionLanguageSpec, WeightsError, hookimpl
from mfuser.errors import suggest
from mfuser.specs import BackboneInfo, Size
from mfuser_plugins.backbones._miniature import known
from mfuser_plugins.backbones._options import LibrarySpec, Statistics
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
    from mfuser_plugins.backbones._clip import ClipBackbone

CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)
HALF: Statistics = (0.5, 0.5, 0.5)


class OpenClipSpec(LibrarySpec, VisionLanguageSpec, name="open_clip"):
    """A vision-language model of the open_clip library. Serves as VFM too.

    model: open_clip's name: "EVA02-L-14-336", "ViT-L-14-336-quickgelu", "ViT-L-16-SigLIP-384".
    weights: a tag ("merged2b_s6b_b61k", "openai", "webli"; "mini-vlm" ships, for the model of the
        same name), a local file (.safetensors, .pt,
        .bin), or "random".
    tokenizer: a local folder with the tokenizer, or "simple" for CLIP's, which ships; None: the
        model's own (SigLIP's comes from the hub).
    interpolation, antialias: how positions are resampled (the released CLIP and SigLIP models:
        bilinear).
    patch_resample: how the patch kernel is resampled: like an image, or "pinv" (FlexiViT).
    class_embeddings: how often the class embedding is added to the class token: twice in the
        released CLIP models. Towers of open_clip's own class only, as drop_path.
    drop_path: stochastic depth in the image tower while the model trains, frozen or not, rising
        linearly to this rate in the last block: 0.1 in the released CLIP models.
    tanh_gelu: GELU by its tanh approximation, with which SigLIP's weights were trained, in both
        towers; open_clip's SigLIP configurations say the exact one.
    context_length: keep so many of the text encoder's positions; prompt.slots + prompt.context
        are read. None: all.
    mean, std: image statistics; None: those of the tag.
    options: merged into open_clip's configuration, e.g. {embed_dim = 64, vision_cfg = {width = 64,
        layers = 4, head_width = 16}, text_cfg = {width = 64, heads = 4, layers = 2}}; towers of
        timm take vision_cfg.timm_model_kwargs.
    """

    tiny: ClassVar[Mapping[str, Any]] = {
        "model": "ViT-B-16",
        "weights": "random",
        "options": {
            "embed_dim": 24,
            "vision_cfg": {"layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
            "text_cfg": {"layers": 1, "width": 32, "heads": 2},
        },
    }

    weights: str
    tokenizer: str | None = None
    class_embeddings: PositiveInt = 1
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    tanh_gelu: bool = False
    context_length: PositiveInt | None = None

    @classmethod
    def catalog(cls) -> list[BackboneInfo]:
        from mfuser_plugins.backbones.catalog import listed

        return listed("open_clip")

    def build(self, image_size: Size) -> ClipBackbone:
        """Raises WeightsError for weights that are missing or do not fit, MFuserError otherwise."""
        import open_clip

        from mfuser_plugins.backbones._clip import create, wrap

        miniature = known()
        cfg = open_clip.get_model_config(self.model)
        if cfg is None:
            models = open_clip.list_models()
            raise MFuserError(f"open_clip has no model '{self.model}'{suggest(self.model, models)}")
        merge(cfg, self.options)
        source = None if self.weights == RANDOM else local_file(self.weights)
        tag = None
        if source is not None:
            miniature.check_world(source)
        elif self.weights != RANDOM:
            tag = find_tag(self.model, self.weights, bool(cfg.get("quick_gelu")))
            source = tag_file(f"{self.model}, {self.weights}", tag)
        model = create(self.model, cfg)
        how = Resampling(self.interpolation, self.antialias, self.patch_resample)
        backbone = wrap(model, self.model, cfg["text_cfg"], how)
        if source is not None:
            load(model, source, self.model, self.weights, bool(cfg.get("quick_gelu")))
        if "multimodal_cfg" in cfg:
            # CoCa's caption decoder, which nothing here reads.
            model.text_decoder = None
        backbone.adapt(self.class_embeddings, self.drop_path, self.tanh_gelu, self.context_length)
        freeze(model, self.freeze)
        if model.logit_bias is None:
            # The alignment loss of softmax models brings its own temperature.
            model.logit_scale.requires_grad_(False)
        backbone.tokenizer_source = self.tokenizer
        backbone.resize(image_size, self.patch_size)
        mean, std = statistics(self.model, tag)
        backbone.set_statistics(self.mean or mean, self.std or std)
        backbone.license = self.license()
        return backbone

    def license(self) -> str | None:
        """As timm states it for the same image tower; None for random weights and local files."""
        import open_clip

        from mfuser_plugins.backbones.catalog import open_clip_license

        miniature = known()
        if (self.model, self.weights) == (miniature.VLM, miniature.VLM):
            return cast(str, miniature.LICENSE)
        if self.weights not in open_clip.list_pretrained_tags_by_model(self.model):
            return None
        return open_clip_license(self.model, self.weights)


def merge(cfg: dict[str, Any], options: dict[str, Any]) -> None:
    """Merge `options` into `cfg`, tables key by key."""
    for key, value in options.items():
        if isinstance(value, dict) and isinstance(cfg.get(key), dict):
            merge(cfg[key], value)
        else:
            cfg[key] = value


def find_tag(model: str, tag: str, quick_gelu: bool) -> dict[str, Any]:
    """open_clip's metadata of a tag. Raises WeightsError if the tag or its activation differs."""
    import open_clip

    miniature = known()
    if (model, tag) == (miniature.VLM, miniature.VLM):
        return cast(dict[str, Any], miniature.open_clip_tag())
    found: dict[str, Any] = open_clip.get_pretrained_cfg(model, tag)
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(model)
        if model == miniature.VLM:
            tags = [miniature.VLM]
        raise WeightsError(f"open_clip has no weights '{tag}' for '{model}'{suggest(tag, tags)}")
    if bool(found.get("quick_gelu")) != quick_gelu:
        raise gelu_mismatch(model, tag, quick_gelu)
    return found


def gelu_mismatch(model: str, weights: str, quick_gelu: bool) -> WeightsError:
    """The weights were trained with the other activation than the model is built with."""
    import open_clip

    trained, built = ("GELU", "QuickGELU") if quick_gelu else ("QuickGELU", "GELU")
    other = model.removesuffix("-quickgelu") if quick_gelu else f"{model}-quickgelu"
    fix = (
        f'use model = "{other}"'
        if other in open_clip.list_models()
        else f"set options.quick_gelu = {'false' if quick_gelu else 'true'}"
    )
    return WeightsError(
        f"the weights '{weights}' of '{model}' were trained with {trained}, and the model is built "
        f"with {built}: {fix}"
    )


def tag_file(what: str, tag: dict[str, Any]) -> Path:
    """The file of a tag, from a cache or downloaded."""
    what = f"open_clip model {what}"
    if file := tag.get("file"):
        return cast(Path, known().shipped(Path(file)))
    if repository := tag.get("hf_hub"):
        folder, _, name = repository.rpartition("/")
        names = [name] if name else ["open_clip_pytorch_model.bin"]
        safe = [
            "open_clip_model.safetensors"
            if n == "open_clip_pytorch_model.bin"
            else f"{n.rpartition('.')[0]}.safetensors"
            for n in names
        ]
        return hub_file(folder, [*safe, *names], what)
    if url := tag.get("url"):
        return url_file(url, what)
    raise WeightsError(f"{what}: open_clip does not say where the weights are; give a local file")


def statistics(model: str, tag: dict[str, Any] | None) -> tuple[Statistics, Statistics]:
    """mean, std of a tag; without one, those that every tag of the model agrees on, else CLIP's."""
    import open_clip

    miniature = known()
    if model == miniature.VLM:
        return miniature.MEAN, miniature.STD
    if tag is not None:
        return tuple(tag.get("mean", CLIP_MEAN)), tuple(tag.get("std", CLIP_STD))
    tags = [
        open_clip.get_pretrained_cfg(model, name)
        for name in open_clip.list_pretrained_tags_by_model(model)
    ]
    pairs = {(tuple(t.get("mean", CLIP_MEAN)), tuple(t.get("std", CLIP_STD))) for t in tags}
    return pairs.pop() if len(pairs) == 1 else (CLIP_MEAN, CLIP_STD)


PUBLISHED = (
    "visual.pos_embed",
    "visual.class_embedding",
    "visual.trunk.cls_token",
    "positional_embedding",
    "token_embedding.weight",
    "ln_final.weight",
    "input_resolution",
    "image_encoder.model.patch_emb.0.block.conv.weight",
)
"""Names by which files in another naming are recognized: BAAI's, Apple's, plain CLIP's."""


def load(model: Any, path: Path, name: str, weights: str, quick_gelu: bool) -> None:
    """A file in open_clip's naming, or BAAI's for EVA-CLIP -> the model.

    quick_gelu: whether the model has that activation. Raises WeightsError on any misfit.
    """

    def convert(tensors: Tensors) -> Tensors:
        return converted(model, tensors, name)

    # Numbers that OpenAI's files carry beside the weights, and buffers of older versions.
    spare = r"(input_resolution|context_length|vocab_size)$|.*(position_ids|attn_mask)$"
    what = f"open_clip model '{name}'"
    found = load_file(model, path, what, weights, convert, published=PUBLISHED, spare=spare)
    if "input_resolution" in found.part.tensors and not quick_gelu:
        raise gelu_mismatch(name, weights, quick_gelu=False)


def converted(model: Any, tensors: Tensors, name: str) -> Tensors:
    """Published names -> those of the model. Raises WeightsError where they cannot be converted."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import CLIP, convert_to_custom_text_state_dict
    from open_clip.timm_model import TimmModel

    try:
        tensors = dict(convert_state_dict(model, tensors))
        if "visual.pos_embed" in tensors and isinstance(model.visual, TimmModel):
            # BAAI's EVA-CLIP files have the image tower where open_clip has a wrapper.
            from mfuser_plugins.backbones._timm_families import stepper_class

            convert = stepper_class(model.visual.trunk, name).convert
            trunk = convert(tensors, model.visual.trunk)
            tensors = {k: v for k, v in tensors.items() if not k.startswith("visual.")}
            tensors |= {f"visual.trunk.{k}": v for k, v in trunk.items()}
        if not isinstance(model, CLIP):
            tensors = convert_to_custom_text_state_dict(tensors)
    except Exception as error:
        raise WeightsError(
            f"the weights do not fit open_clip model '{name}': {len(tensors)} tensors "
            f"({', '.join(list(tensors)[:3])}, …) of another architecture"
        ) from error
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in tensors and getattr(model, scalar) is not None:
            tensors[scalar] = tensors[scalar].reshape(getattr(model, scalar).shape)
    return tensors


@hookimpl
def mfuser_components() -> list[type[VisionLanguageSpec]]:
    return [OpenClipSpec]
