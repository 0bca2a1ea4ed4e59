"""Builds a model from a pairing: its parts, joined at the widths they declare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mfuser.config.pairing import PairingSpec
from mfuser.errors import MFuserError, placed
from mfuser.interfaces import (
    Decoder,
    FusionAdapter,
    JoiningDecoder,
    ManyFusionAdapter,
    TextEnhancer,
    VisionBackbone,
    VisionLanguageBackbone,
)
from mfuser.losses import Loss, LossParts
from mfuser.model.criteria import Before
from mfuser.model.dgss import DGSSModel, Prompt
from mfuser.model.encoder import PairEncoder, default_taps, lockstep, shapes
from mfuser.model.joining import check_joins
from mfuser.model.pyramid import STRIDES, Pyramid
from mfuser.plugins.contracts import built, complete, expect, freezes
from mfuser.specs import VisionLanguageSpec, VisionSpec

if TYPE_CHECKING:
    from mfuser.config.registry import Registry


def build_model(
    pairing: str | PairingSpec,
    registry: Registry | None = None,
    *,
    seed: int = 0,
    **overrides: Any,
) -> DGSSModel:
    """Assemble a pairing: by its name in the registry, or from a resolved spec.

    overrides: top-level keys of the pairing, e.g. `fusion="none"`, `image_size=224`,
        `vfm={"weights": "dinov2.pth"}` (a table without a name changes options).
    seed: of everything that starts random; the global generator is left as it was.

    Raises RegistryError for a spec that does not hold, WeightsError for missing weights.
    """
    if isinstance(pairing, str):
        if registry is None:
            from mfuser.config.registry import load_registry

            registry = load_registry()
        spec = registry.pairing(pairing, overrides, by="build_model")
    elif overrides:
        raise MFuserError("overrides go with a pairing's name; a resolved spec is taken as it is")
    else:
        spec = pairing
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _assemble(spec).eval()
    model.record = {"run": {"seed": seed}}
    return model


def sketch(spec: PairingSpec) -> DGSSModel:
    """The model's layout on the meta device: shapes and counts, no weights, no tokenizer."""
    with torch.device("meta"):
        return _assemble(without_weights(spec), tokens="none").eval()


def random_model(spec: PairingSpec) -> DGSSModel:
    """The model with random values in place of all weights, for what does not depend on them.

    Where no tokenizer can be loaded, every class is the same token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _assemble(without_weights(spec), tokens="if there").eval()
    if model.encoder.vlm is not None and model.ids is None:
        model.ids = torch.ones(len(model.classes), spec.prompt.slots, dtype=torch.long)
    return model


def unfilled(spec: PairingSpec) -> DGSSModel:
    """The model without values in its parameters (they are on the meta device), buffers computed.

    For `load_state_dict(…, assign=True)`: no weights are looked for, no memory is taken. Losses
    beside the decoder's are left out: such a model answers and does not train. A tokenizer that
    cannot be loaded is an error only once class texts are needed. Models whose
    constructors compute with their parameters (ViTamin, Swin) cannot be built so: theirs are
    random values in memory.
    """
    spec = without_weights(spec).model_copy(update={"losses": ()})
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            return _assemble(spec, tokens="if there").eval()
    except MFuserError:  # a fault of the spec itself comes up again
        return _assemble(spec, tokens="if there").eval()


def without_weights(spec: Any) -> Any:
    """The same spec with every backbone's weights "random", nested ones too."""
    if isinstance(spec, BaseModel):
        update = {n: without_weights(getattr(spec, n)) for n in type(spec).model_fields}
        if "weights" in update:
            update["weights"] = "random"
        return spec.model_copy(update=update)
    if isinstance(spec, list | tuple):
        return type(spec)(map(without_weights, spec))
    if isinstance(spec, dict):
        return {key: without_weights(value) for key, value in spec.items()}
    return spec


def _assemble(spec: PairingSpec, tokens: Literal["all", "if there", "none"] = "all") -> DGSSModel:
    _check_joined(spec)
    backbones: dict[str, VisionBackbone] = {}
    for role, backbone_spec in spec.encoders().items():
        try:
            backbones[role] = _backbone(role, backbone_spec, spec.image_size)
        except MFuserError as error:
            raise placed(error, f"{role} '{backbone_spec.name}'") from error
        if backbones[role].depth < 1:
            raise MFuserError(f"{role} '{backbone_spec.name}' has no blocks; give it a depth")
    vlm = backbones.get("vlm")
    assert vlm is None or isinstance(vlm, VisionLanguageBackbone)
    vfms = [backbone for role, backbone in backbones.items() if role != "vlm"]

    before = None
    if vlm is not None and any("frozen" in loss.needs for loss in spec.losses):
        # Where it stays as it is, it stands for itself.
        before = Before(copy.deepcopy(vlm)) if spec.trains("vlm") else None
    _tune(spec, backbones)
    positions = len(lockstep([b.depth for b in backbones.values()]))
    joins = spec.decoder.joins()
    taps = () if joins else _taps(spec.taps, positions)
    encoder = PairEncoder(
        vfms if isinstance(spec.vfm, tuple) else backbones.get("vfm"),
        vlm,
        _adapters(spec, backbones, positions),
        taps,
        project_vfm=_projections(spec, backbones),
        vfm_norm=spec.merge.vfm_norm,
    )
    if min(spec.image_size) < STRIDES[-1]:
        raise MFuserError(
            f"image_size {spec.image_size} is below {STRIDES[-1]} pixels, the pyramid's coarsest "
            "stride; enlarge it"
        )
    text_dim = vlm.text_dim if vlm is not None else None
    classes = len(spec.classes)
    pyramid: Pyramid | None = None
    decoder: Decoder
    if joins:
        first = next(iter(backbones.values()))
        shape, patch_size = first.token_shape, first.patch_size
        build_joining = partial(spec.decoder.build_joining, shape, patch_size, classes, text_dim)
        decoder = built(spec.decoder, JoiningDecoder, build_joining)
    else:
        patch = spec.image_size[0] / encoder.grid[0]
        trained = spec.pyramid.resize == "trained"
        pyramid = Pyramid(encoder.tap_channels, spec.pyramid.width, patch, trained)
        build_decoder = partial(spec.decoder.build, pyramid.channels, classes, text_dim)
        decoder = built(spec.decoder, Decoder, build_decoder)
    if decoder.learned_queries is not None and encoder.link(*decoder.learned_queries):
        decoder.take_queries()
    enhancer = built(
        spec.enhancer, TextEnhancer, lambda: spec.enhancer.build(text_dim or 0, classes)
    )
    prompt = ids = cause = None
    if vlm is not None:
        try:
            ids = _ids(spec, vlm, tokens != "none")
        except MFuserError as error:
            if tokens == "all":
                raise
            cause = str(error)
        if spec.prompt.context:
            prompt = Prompt(spec.prompt.context, vlm.context_dim)
    parts = LossParts(
        spec.classes,
        () if pyramid is None else pyramid.channels,
        text_dim,
        partial(_encode, spec, vlm, tokens != "none"),
    )
    criteria = {  # last, so that nothing else starts from other numbers for their sake
        loss.name: built(loss, Loss, partial(loss.build, parts)) for loss in spec.losses
    }
    model = DGSSModel(spec, encoder, pyramid, enhancer, decoder, prompt, ids, criteria, before)
    if cause is not None:
        model.without_ids = f"no prompt.ids, and the class names cannot be tokenized: {cause}"
    return model


def with_classes(model: DGSSModel, classes: tuple[str, ...]) -> DGSSModel:
    """The model, changed in place, answering for other classes: their names become its texts.

    Raises MFuserError where its decoder answers for its own classes alone (`open_vocabulary`) or it
    has no vision-language model.
    """
    vlm = model.encoder.vlm
    if vlm is None or not model.decoder.open_vocabulary:
        raise MFuserError(
            f"decoder '{model.spec.decoder.name}' answers for the classes that it was trained on, "
            "not for others"
        )
    prompt = model.spec.prompt.model_copy(update={"ids": None})
    model.spec = model.spec.model_copy(update={"classes": classes, "prompt": prompt})
    ids = _ids(model.spec, vlm, True)
    model.ids = ids.to(model.ids.device) if isinstance(model.ids, Tensor) else ids
    return model


def _check_joined(spec: PairingSpec) -> None:
    """Whether the decoder's tokens can join the encoder's blocks, asked before weights are read."""
    if not spec.decoder.joins():
        return
    role, tower = next(iter(spec.encoders().items()))
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            laid_out = _backbone(role, without_weights(tower), spec.image_size)
    except MFuserError as error:
        raise placed(error, f"{role} '{tower.name}'") from error
    check_joins(spec.decoder, role, laid_out)


def _ids(spec: PairingSpec, vlm: VisionLanguageBackbone, tokens: bool) -> Tensor:
    """Token ids of the class names (K, slots): given, or tokenized; zeros without tokens."""
    slots = spec.prompt.slots
    if not tokens:
        return torch.zeros(len(spec.classes), slots, dtype=torch.long)
    if spec.prompt.ids is not None:
        return torch.tensor(spec.prompt.ids, dtype=torch.long)
    return vlm.tokenize(list(spec.classes), slots)


def _encode(
    spec: PairingSpec,
    vlm: VisionLanguageBackbone | None,
    tokens: bool,
    texts: list[str],
    slots: int | None = None,
) -> Tensor:
    """`LossParts.encode`. Without tokens, the embeddings of nothing."""
    assert vlm is not None, "a loss that needs text is refused without it"
    count = slots or spec.prompt.slots + spec.prompt.context
    ids = torch.zeros(len(texts), count, dtype=torch.long)
    with torch.no_grad():
        ids = vlm.tokenize(texts, count) if tokens else ids
        embedded: Tensor = vlm.within(vlm.encode_text, ids)
    return expect(vlm, "encode_text()'s result", embedded, (len(texts), vlm.text_dim))


def _backbone(
    role: str, spec: VisionSpec | VisionLanguageSpec, image_size: tuple[int, int]
) -> VisionBackbone:
    kind = VisionLanguageBackbone if role == "vlm" else VisionBackbone
    backbone: VisionBackbone = built(spec, kind, lambda: spec.build(image_size))
    complete(backbone)
    freezes(backbone, spec.freeze)
    return backbone


def _taps(taps: Sequence[int] | None, positions: int) -> tuple[int, ...]:
    if taps is None:
        return default_taps(positions)
    if max(taps) >= positions:
        raise MFuserError(
            f"taps {tuple(taps)} go beyond the {positions} positions of this pairing "
            f"(0 to {positions - 1})"
        )
    return tuple(taps)


def _tune(spec: PairingSpec, backbones: Mapping[str, VisionBackbone]) -> None:
    """Change the chosen encoders in place."""
    tuning = spec.tuning
    for role in spec.tuned():
        assert tuning is not None
        backbone = backbones[role]
        before = {id(p) for p in backbone.parameters() if p.requires_grad}
        try:
            built(tuning, type(None), partial(tuning.build, backbone))
        except MFuserError as error:
            raise placed(error, f"tuning '{tuning.name}' of the {role}") from error
        backbone.tuned = frozenset(
            name
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad and id(parameter) not in before
        )


def _adapters(
    spec: PairingSpec, backbones: Mapping[str, VisionBackbone], positions: int
) -> dict[int, nn.Module]:
    """An adapter after every N-th position (paper, table 11)."""
    fusion = spec.fusion
    kind: type[nn.Module] = FusionAdapter
    build: Callable[[], nn.Module | None] = partial(fusion.build, *shapes(backbones))
    if isinstance(spec.vfm, tuple):
        of_each = {role: backbone.token_shape for role, backbone in backbones.items()}
        kind, build = ManyFusionAdapter, partial(fusion.build_many, of_each)
    adapters = {
        p: built(fusion, kind, build, optional=True)
        for p in range(positions)
        if (p + 1) % fusion.every == 0
    }
    return {p: adapter for p, adapter in adapters.items() if adapter is not None}


def _projections(spec: PairingSpec, backbones: Mapping[str, VisionBackbone]) -> nn.Module | None:
    """The VFM's projection, or several by role; None where nothing is mapped."""
    if "vlm" not in backbones:
        return None
    made = {
        role: _projection(spec, role, vfm, backbones["vlm"])
        for role, vfm in backbones.items()
        if role != "vlm"
    }
    maps = {role: linear for role, linear in made.items() if linear is not None}
    if isinstance(spec.vfm, tuple):
        return nn.ModuleDict(maps) if maps else None
    return maps.get("vfm")


def _projection(
    spec: PairingSpec, role: str, vfm: VisionBackbone, vlm: VisionBackbone
) -> nn.Module | None:
    wanted = spec.merge.project
    if wanted is None:
        wanted = vfm.embed_dim != vlm.embed_dim
    if not wanted and vfm.embed_dim != vlm.embed_dim:
        raise MFuserError(
            f"merge.project = false, but the widths differ ({role} {vfm.embed_dim}, vlm "
            f"{vlm.embed_dim}); leave it out"
        )
    return nn.Linear(vfm.embed_dim, vlm.embed_dim) if wanted else None
