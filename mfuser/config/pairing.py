"""A pairing: two encoders, the parts that fuse them, and the parts that turn them into masks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from mfuser.config.classes import CITYSCAPES
from mfuser.config.declared import Declared
from mfuser.errors import below
from mfuser.interfaces import IGNORE
from mfuser.specs import (
    DecoderSpec,
    EnhancerSpec,
    FusionSpec,
    ImageSize,
    LossSpec,
    Options,
    Spec,
    TuningSpec,
    VisionLanguageSpec,
    VisionSpec,
    component_of,
    known_components,
)


class PromptSpec(Options):
    """The text prompt: [start, learned context, class name, end].

    context: learned tokens after the first one; 0 turns them off.
    slots: tokens a bare class name may take, start and end included. Encoders that pool the last
        position (SigLIP) give another embedding for another number.
    ids: the token ids of the class names, `slots` for each, used instead of the tokenizer.
        Converted checkpoints contain them, so that no tokenizer has to be downloaded.
    """

    context: NonNegativeInt = 8
    slots: PositiveInt = 5
    ids: tuple[tuple[NonNegativeInt, ...], ...] | None = None


class MergeSpec(Options):
    """The merge of the two final token sequences into one visual embedding: x_vlm + P(x_vfm).

    vfm_norm: apply the VFM's final norm first (off in the released CLIP models).
    project: a linear map P. None: only where the widths differ.
    """

    vfm_norm: bool = True
    project: bool | None = None


class PyramidSpec(Options):
    """Features at strides 4, 8, 16, 32 from the taps of both encoders, concatenated.

    width: project the concatenated taps to this width first; None keeps their sum (the released
        models: 2 x 1024 channels, of which the up-sampling alone trains 50 M parameters).
    resize: "trained": transposed convolutions, as in the released models; "bilinear": nothing
        trains, as in Rein and its successors.
    """

    width: PositiveInt | None = None
    resize: Literal["trained", "bilinear"] = "trained"


class AlignmentSpec(Options):
    """The pixel-text alignment loss (paper, eq. 12) on the map of cosine similarities.

    loss: "softmax" (every released model, SigLIP's too) or "sigmoid" (the paper's text for
        SigLIP).
    temperature: of softmax models; sigmoid models bring their own scale and bias.
    logit_scale, logit_bias: in place of a sigmoid model's own: exp(logit_scale) * similarity +
        logit_bias. The released SigLIP checkpoints do not hold them.
    """

    weight: NonNegativeFloat = 1.0
    loss: Literal["softmax", "sigmoid"] = "softmax"
    temperature: PositiveFloat = 0.07
    logit_scale: float | None = None
    logit_bias: float | None = None


def _absent(value: Any) -> Any:
    return None if value in ("none", {"name": "none"}) else value


def _classes(value: Any) -> Any:
    if value == "cityscapes":
        return CITYSCAPES.names
    return tuple(value) if isinstance(value, list) else value


Absent = BeforeValidator(_absent)
AnyVision = SerializeAsAny[VisionSpec | VisionLanguageSpec]


def _list_of_one(value: Any) -> Any:
    if value == "none":
        return ()
    if isinstance(value, str | dict | LossSpec):
        return (value,)
    if isinstance(value, list | tuple):
        return value
    raise ValueError(f'takes a list such as ["ohem"], not {value!r}')


def _one_or_more(value: Any, info: ValidationInfo) -> Any:
    """One VFM, or several; a list of one is the one."""
    if not isinstance(value, list | tuple):
        return _vision(value, info)
    if not value:
        raise ValueError('the list of VFMs is empty; write "none" to leave the VFM out')
    if any(_absent(one) is None for one in value):
        raise ValueError("a list of VFMs names each of them; leave 'none' out")
    if len(value) == 1:
        return _vision(value[0], info)
    specs = []
    for i, one in enumerate(value, 1):
        try:
            specs.append(_vision(one, info))
        except ValidationError as error:
            raise below(error, str(i)) from None
        except ValueError as error:
            raise ValueError(f"number {i} of the list: {error}") from None
    return tuple(specs)


def _vision(value: Any, info: ValidationInfo) -> Any:
    if value is None or isinstance(value, Spec):
        return value
    return known_components(info).validate(("vision", "vision_language"), value)


class PairingSpec(Declared):
    """Everything that decides the model; it rebuilds the model from there alone.

    vfm, vlm: the encoders; "none" leaves one out. A vision-language model may serve as VFM, and a
        list of VFMs as one: [{name = …}, {name = …}], called vfm_1, vfm_2, …; a setting of one of
        them is vfm.1.weights = ….
    tuning: small trained changes inside the encoders, beside fusion; "none", or e.g. "lora".
    taps: positions (blocks of the shallowest encoder, from 0) whose tokens feed the pyramid. None:
        after a third, a half, two thirds and all of the depth, 7, 11, 15, 23 of 24 as released.
    image_size: what the model is trained on, and the sliding window it is tested with.
    losses: components beside the decoder's own losses and the alignment, each with its `weight`; a
        list, or one alone; "none".
    """

    vfm: Annotated[
        AnyVision | tuple[AnyVision, ...] | None, BeforeValidator(_one_or_more), Absent
    ] = None
    vlm: Annotated[
        SerializeAsAny[VisionLanguageSpec] | None, component_of("vision_language"), Absent
    ] = None
    fusion: Annotated[SerializeAsAny[FusionSpec], component_of("fusion")] = Field(
        default="none", validate_default=True
    )
    tuning: Annotated[SerializeAsAny[TuningSpec] | None, component_of("tuning"), Absent] = None
    enhancer: Annotated[SerializeAsAny[EnhancerSpec], component_of("enhancer")] = Field(
        default="none", validate_default=True
    )
    decoder: Annotated[SerializeAsAny[DecoderSpec], component_of("decoder")]
    image_size: ImageSize = (512, 512)
    classes: Annotated[tuple[str, ...], BeforeValidator(_classes)] = CITYSCAPES.names
    taps: tuple[NonNegativeInt, ...] | None = None
    prompt: PromptSpec = PromptSpec()
    merge: MergeSpec = MergeSpec()
    pyramid: PyramidSpec = PyramidSpec()
    alignment: AlignmentSpec = AlignmentSpec()
    losses: Annotated[
        tuple[Annotated[SerializeAsAny[LossSpec], component_of("loss")], ...],
        BeforeValidator(_list_of_one),
    ] = ()

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without losses where there are none, as pairings were written before there were any:
        checkpoints and studies that are compared with them stay the same."""
        table: dict[str, Any] = handler(self)
        if not self.losses:
            table.pop("losses", None)
        return table

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> PairingSpec:
        vfm, vlm = self.vfm, self.vlm
        if vfm is None and vlm is None:
            raise ValueError("a pairing needs a 'vfm', a 'vlm' or both")
        if vlm is None and self.decoder.needs_text:
            raise ValueError(
                f"decoder '{self.decoder.name}' takes class queries from text, and there is no "
                "'vlm' to make them; use decoder = \"linear\" or add a vlm"
            )
        if vlm is None and self.enhancer.name != "none":
            raise ValueError(
                f"enhancer '{self.enhancer.name}' works on class text embeddings, and there is no "
                "'vlm' to make them; use enhancer = \"none\" or add a vlm"
            )
        if self.decoder.joins():
            self._fits_joining()
        one_tower = vfm is None or vlm is None
        if one_tower and self.fusion.name != "none" and not self.fusion.single_tower:
            raise ValueError(
                f"fusion '{self.fusion.name}' joins two encoders, and there is only one; use "
                'fusion = "none" or add the other'
            )
        if isinstance(vfm, tuple) and not self.fusion.any_number:
            able = [
                name
                for name, c in known_components(info).kind("fusion").items()
                if c.spec.any_number
            ]
            raise ValueError(
                f"fusion '{self.fusion.name}' joins one VFM and one VLM, and 'vfm' is a list of "
                f"{len(vfm)}; those that join any number: {', '.join(able)}"
            )
        self.tuned()
        self._check_losses()
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError("'classes' needs at least one name, and no name twice")
        if len(self.classes) > IGNORE:
            raise ValueError(
                f"'classes' has {len(self.classes)} names; a mask of 8 bits holds at most {IGNORE} "
                f"beside the ignored {IGNORE}"
            )
        ids = self.prompt.ids
        if ids is not None and [len(row) for row in ids] != [self.prompt.slots] * len(self.classes):
            raise ValueError(
                f"'prompt.ids' needs {self.prompt.slots} numbers (prompt.slots) for each of the "
                f"{len(self.classes)} classes; leave it out to have the class names tokenized"
            )
        if self.taps is not None and len(self.taps) != 4:
            raise ValueError(f"'taps' takes four positions (strides 4 to 32), not {len(self.taps)}")
        return self

    def _fits_joining(self) -> None:
        """Checks the options that do not go with a decoder that runs the last blocks itself."""
        if self.enhancer.name != "none":
            raise ValueError(
                f"decoder '{self.decoder.name}' joins the encoder's last blocks, and enhancer "
                f"'{self.enhancer.name}' reads what comes after them; use enhancer = \"none\""
            )
        if self.taps is not None:
            raise ValueError(
                f"decoder '{self.decoder.name}' joins the encoder's last blocks and reads no "
                "'taps'; leave them out"
            )

    def _check_losses(self) -> None:
        for i, loss in enumerate(self.losses):
            if loss.name in [other.name for other in self.losses[:i]]:
                raise ValueError(
                    f"loss '{loss.name}' is given twice; give it once, with its weight"
                )
            wants = {
                "text": "compares with class texts",
                "frozen": "holds the vision-language model to what it was",
            }
            for need, what in wants.items():
                if need in loss.needs and self.vlm is None:
                    raise ValueError(
                        f"loss '{loss.name}' {what}, and there is no 'vlm'; leave it out or add a "
                        "vlm"
                    )
            if "frozen" in loss.needs and not self._changes_vlm():
                raise ValueError(
                    f"loss '{loss.name}' {wants['frozen']}, and nothing here changes it: it is "
                    "frozen, not tuned, and alone; leave the loss out, or set vlm.freeze = false"
                )

    def _changes_vlm(self) -> bool:
        """Whether training changes what the vision-language model makes of an image."""
        return (
            self.vfm is not None
            or self.trains("vlm")
            or (self.fusion.name != "none" and self.fusion.single_tower)
        )

    def trains(self, role: str) -> bool:
        """Whether training changes weights of an encoder that is there."""
        return role in self.tuned() or not self.encoders()[role].freeze

    def encoders(self) -> dict[str, VisionSpec | VisionLanguageSpec]:
        """The encoders that are there, by role: "vfm", or "vfm_1", "vfm_2", … of a list; "vlm"."""
        vfm = self.vfm if isinstance(self.vfm, tuple) else (self.vfm,)
        roles = {f"vfm_{i}" if len(vfm) > 1 else "vfm": spec for i, spec in enumerate(vfm, 1)}
        roles["vlm"] = self.vlm
        return {role: spec for role, spec in roles.items() if spec is not None}

    def tuned(self) -> list[str]:
        """The roles that `tuning` changes. Raises ValueError for one that is not there."""
        if self.tuning is None:
            return []
        there = list(self.encoders())
        if self.tuning.encoders is None:
            return there
        chosen = []
        for asked in self.tuning.encoders:
            found = [r for r in there if r == asked or (asked == "vfm" and r.startswith("vfm_"))]
            if not found:
                raise ValueError(
                    f"tuning '{self.tuning.name}' is to change the '{asked}', and there is none "
                    f"(there is {', '.join(there)}); leave 'encoders' out to tune those that are "
                    "there"
                )
            chosen += found
        return list(dict.fromkeys(chosen))


def option_of(role: str) -> str:
    """The key of an encoder in a pairing: "vfm", "vlm", and "vfm.2" of the role "vfm_2"."""
    return role.replace("_", ".")
