"""Specs: the options of every component, as pydantic models.

A component is one spec class. Its fields are its options, its docstring is its help, and its
`build` makes the module from what the partners declare, so that nothing is typed twice. The kind
follows from the base class; the name is given where the class is defined:

    class SwapSpec(FusionSpec, name="swap"):
        share: PositiveFloat = 0.1
        def build(self, vfm, vlm): ...

This module imports pydantic alone: specs can be listed and validated without torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from mfuser.errors import PluginError, explained
from mfuser.shapes import BackboneInfo as BackboneInfo
from mfuser.shapes import Proposal as Proposal
from mfuser.shapes import TokenShape as TokenShape

if TYPE_CHECKING:
    from pydantic import ModelWrapValidatorHandler
    from typing_extensions import Self

    from mfuser import inference, interfaces, losses

Size = tuple[PositiveInt, PositiveInt]
"""(height, width) in pixels; a single integer in a registry means a square."""


def _square(value: Any) -> Any:
    if isinstance(value, int):
        return (value, value)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"a size is one number or [height, width], not {value!r}")
    return value


ImageSize = Annotated[Size, BeforeValidator(_square)]


class Options(BaseModel):
    """A table of options: unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def describes(cls) -> str:
        """The owner of these options, for messages: "fusion 'mvfuser'"; "" if not a component."""
        return ""

    @model_validator(mode="wrap")
    @classmethod
    def _explains(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Here, where the keys that may be given are known, is said which they are."""
        try:
            return handler(value)
        except ValidationError as error:
            keys = [key for key in cls.model_fields if key != "name" or not cls.describes()]
            raise explained(error, cls.describes(), keys) from None


class Spec(Options):
    """The options of one component. Subclass the base of a kind, never this class."""

    kind: ClassVar[str] = ""
    tiny: ClassVar[Mapping[str, Any]] = {}
    """Options at which the component is small and downloads nothing. `mfuser plugin check` builds
    it with them, as itself and as the partner of others."""
    if TYPE_CHECKING:
        name: str = ""  # a spec with a name has it as default; others are never made
    else:
        name: str

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:
            inherited = cls.__mro__[1].model_fields.get("name")  # type: ignore[attr-defined]
            if inherited is not None and isinstance(inherited.default, str):
                raise PluginError(
                    f"spec '{cls.__name__}' has no name: write "
                    f'class {cls.__name__}({cls.__bases__[0].__name__}, name="…")'
                )
            return
        # Before pydantic collects the fields: the name becomes a literal with itself as default,
        # which is what tells the members of a kind's union apart.
        cls.__annotations__ = {**vars(cls).get("__annotations__", {}), "name": Literal[name]}
        cls.name = name

    @classmethod
    def component(cls) -> str:
        """The component's name, as written in a registry."""
        return str(cls.model_fields["name"].default)

    @classmethod
    def describes(cls) -> str:
        return f"{cls.kind.replace('_', '-')} '{cls.component()}'"


class BackboneSpec(Spec):
    """Options that every backbone has.

    weights: None: the component's own default; a tag or name the library knows, a path to a local
        file (.safetensors, .pth, .pt), or "random". Never guessed: a backbone without its weights
        is an error. Models are laid out with "random", for which `build` reads no weights.
    freeze: train nothing in it (the recipe of the paper).
    patch_size: resample the patch projection to another patch size, e.g. 14 -> 16.
    """

    weights: str | None = None
    freeze: bool = True
    patch_size: PositiveInt | None = None

    @classmethod
    def catalog(cls) -> Iterable[BackboneInfo]:
        """Optional: the models this component knows by name, without building any."""
        return ()

    def license(self) -> str | None:
        """Optional: the license of the weights named here, where known; loads nothing."""
        return None


class VisionSpec(BackboneSpec):
    """A vision foundation model."""

    kind: ClassVar[str] = "vision"

    def build(self, image_size: Size) -> interfaces.VisionBackbone:
        """The backbone for images of `image_size` (height, width), weights loaded."""
        raise NotImplementedError


class VisionLanguageSpec(BackboneSpec):
    """A vision-language model: a vision backbone with an aligned text encoder."""

    kind: ClassVar[str] = "vision_language"

    def build(self, image_size: Size) -> interfaces.VisionLanguageBackbone:
        """The backbone for images of `image_size` (height, width), weights loaded."""
        raise NotImplementedError


class FusionSpec(Spec):
    """Adapters between the blocks, by which the two encoders exchange features.

    every: an adapter after every N-th pair of blocks (paper, table 11).
    """

    kind: ClassVar[str] = "fusion"
    single_tower: ClassVar[bool] = False
    """Whether it also works with one encoder alone (the other's shape is then None)."""
    any_number: ClassVar[bool] = False
    """Whether it joins any number of encoders, by `build_many`; else a list of VFMs is refused."""

    every: PositiveInt = 1

    def build(
        self, vfm: TokenShape | None, vlm: TokenShape | None
    ) -> interfaces.FusionAdapter | None:
        """One adapter; called once per fused position. None: the encoders are not fused."""
        raise NotImplementedError

    def build_many(self, shapes: Mapping[str, TokenShape]) -> interfaces.ManyFusionAdapter | None:
        """The same where the VFMs are a list: role ("vfm_1", "vfm_2", …, "vlm") -> shape.

        Called with `any_number` alone.
        """
        raise NotImplementedError


def _role(value: str) -> str:
    if not ROLE.fullmatch(value):
        raise ValueError(f"an encoder is 'vfm', 'vlm', or 'vfm_2' of a list, not {value!r}")
    return value


ROLE = re.compile(r"vlm|vfm(_[1-9][0-9]*)?")
"""Names of encoders: "vfm", or of a list of them "vfm_1", "vfm_2", …; "vlm"."""
Role = Annotated[str, AfterValidator(_role)]


class TuningSpec(Spec):
    """Small trained changes to the encoders' own layers, beside fusion.

    encoders: which of them; "vfm" is all of a list, "vfm_2" its second. None: those that are there.
    """

    kind: ClassVar[str] = "tuning"

    encoders: tuple[Role, ...] | None = None

    def build(self, backbone: interfaces.VisionBackbone) -> None:
        """Change a backbone in place; called once for each chosen encoder.

        Added parameters that require gradients are trained and saved with the model.
        """
        raise NotImplementedError


class EnhancerSpec(Spec):
    """Turns class text embeddings into the class queries of an image."""

    kind: ClassVar[str] = "enhancer"

    def build(self, text_dim: int, num_classes: int) -> interfaces.TextEnhancer:
        """`text_dim` is the joint text-image width C."""
        raise NotImplementedError


class DecoderSpec(Spec):
    """Turns the feature pyramid, and class queries where it takes them, into masks."""

    kind: ClassVar[str] = "decoder"
    needs_text: ClassVar[bool] = False
    """Whether it needs class queries, hence a vision-language model."""

    def joins(self) -> int:
        """How many of an encoder's last blocks its own tokens join: the VFM's (of a list the first
        one's), the VLM's where it is alone. 0: it reads the pyramid, as most do."""
        return 0

    def build_joining(
        self, tokens: TokenShape, patch_size: Size, num_classes: int, text_dim: int | None
    ) -> interfaces.JoiningDecoder:
        """The decoder where it `joins` blocks, of an encoder with these tokens, each a patch of
        `patch_size` pixels; in place of `build`."""
        raise NotImplementedError

    def build(
        self, channels: tuple[int, ...], num_classes: int, text_dim: int | None
    ) -> interfaces.Decoder:
        """`channels` of the pyramid levels, finest first; `text_dim` None without a VLM."""
        raise NotImplementedError


Need = Literal["log_probs", "text", "view", "frozen"]
"""The inputs that a loss has to ask for; see `LossInputs`."""


class LossSpec(Spec):
    """A loss beside the decoder's own.

    weight: its losses are multiplied by it.
    """

    kind: ClassVar[str] = "loss"
    needs: ClassVar[tuple[Need, ...]] = ()
    """"log_probs": class probabilities at the labels' size. "text": class queries and what they are
    compared with, hence a vision-language model. "view": a second view of the images, by the
    loss's own `view`. "frozen": the vision-language model as it was before training."""

    weight: PositiveFloat = 1.0

    def build(self, parts: losses.LossParts) -> losses.Loss:
        """Parameters that require gradients are trained and saved with the model."""
        raise NotImplementedError


class InferenceSpec(Spec):
    """How images of any size become class scores, once the model is trained."""

    kind: ClassVar[str] = "inference"

    def build(self) -> inference.Inference:
        """The inference; it knows the model only when it is called."""
        raise NotImplementedError

    def resolved(self, window: Size) -> Self:
        """Optional: the same with what follows from the window filled in, for a report."""
        return self


class DatasetSpec(Spec):
    """Labeled images of one domain.

    split: "train" or "val", as the dataset's own folders define them.
    test_size: (width, height) that images are resized into, keeping their ratio, before they are
        segmented; labels stay as they are. None: as stored.
    """

    kind: ClassVar[str] = "dataset"
    needs_root: ClassVar[bool] = True
    """False for datasets made on the fly."""
    variant: ClassVar[str | None] = None
    """The option that "NAME:VALUE" sets where a dataset is named, e.g. acdc's condition."""

    official: ClassVar[Mapping[str, int]] = {}
    """Split -> images that the publisher ships, for `mfuser data check`."""

    split: Literal["train", "val"] | None = None
    test_size: Size | None = None

    def official_count(self, split: str) -> int | None:
        """`official`, unless an option chooses a part of the dataset."""
        chosen = self.model_fields_set - {"name", "split", "test_size"}
        return None if chosen else self.official.get(split)

    def build(self, root: Path | None, split: str) -> interfaces.Dataset:
        """The dataset below `root`; `split` is what the caller wants where the spec says none."""
        raise NotImplementedError

    @classmethod
    def write_example(cls, root: Path) -> None:
        """Optional: write a few samples in the dataset's own layout into an empty folder, so that
        `mfuser plugin check` can read them where there is no data."""
        raise NotImplementedError

    @classmethod
    def propose(cls, folder: Path) -> Proposal | None:
        """Optional: the options under which this component could read `folder` as it lies, for
        `mfuser data new`; None where it does not recognize it. Looks at names and a sample."""
        return None

    def expand(self) -> list[DatasetSpec]:
        """The domains this stands for as a target: itself, or one per condition (ACDC)."""
        return [self]

    def label(self) -> str:
        """The domain's name in reports, e.g. "acdc:fog"."""
        return self.component()


KINDS: dict[str, type[Spec]] = {
    base.kind: base
    for base in (
        VisionSpec,
        VisionLanguageSpec,
        FusionSpec,
        TuningSpec,
        EnhancerSpec,
        DecoderSpec,
        LossSpec,
        InferenceSpec,
        DatasetSpec,
    )
}


_installed: Callable[[], Any] | None = None


def offer_installed(components: Callable[[], Any]) -> None:
    """Tell `component_of` where to look without a validation context. Called by the discovery of
    plugins, which stands above this module."""
    global _installed
    _installed = components


def known_components(info: ValidationInfo) -> Any:
    """The components that a validation may name. Raises ValueError where none are known."""
    components = (info.context or {}).get("components")
    if components is None:
        if _installed is None:
            raise ValueError(
                "no components are known here: validate with "
                'context={"components": mfuser.load_registry().components}'
            )
        components = _installed()
    return components


def component_of(*kinds: str) -> BeforeValidator:
    """For a field that holds a component of one of these kinds, whichever plugin offers it:

        vision: Annotated[SerializeAsAny[VisionSpec], component_of("vision")]

    Validated by the spec class that owns the name, which the validation context knows
    (`model_validate(data, context={"components": components})`). The first kind that has the
    name wins. The string "linear" is short for {name = "linear"}.
    """

    def validate(value: Any, info: ValidationInfo) -> Any:
        if value is None or isinstance(value, Spec):
            return value
        return known_components(info).validate(kinds, value)

    return BeforeValidator(validate)
