"""Recipes: optimizer, schedule, augmentation, sampling, and how the result is tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from mfuser.config.compilation import Compilation
from mfuser.config.declared import Declared
from mfuser.config.tables import flat
from mfuser.data.transforms import AugmentationSpec
from mfuser.specs import ImageSize, InferenceSpec, Options, component_of

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""torch's generators take 63 bits."""


DEFAULT = "default"
"""The entry of a table of weight decays that holds for all it does not name."""


class RareClassSpec(Options):
    """Rare-class sampling (DAFormer, Hoyer et al. 2022, section 3.3).

    temperature: of the softmax over 1 - frequency; 0.01 strongly favors rare classes (DAFormer),
        100, as released, is nearly uniform over classes.
    min_pixels: pixels of a class that an image must show to count as having it.
    """

    temperature: PositiveFloat = 100.0
    min_pixels: PositiveInt = 3000


class AverageSpec(Options):
    """Averages of the trained weights (EMA): evaluated, and saved beside the last weights.

    decay: what a step keeps of the average. It is reached slowly, to keep the
        initial weights out of short runs: n steps after the warm-up it is at most n / (n + 10).
    warmup: steps before averaging begins; until then the average is the weights themselves.
    """

    decay: float = Field(default=0.999, ge=0, lt=1)
    warmup: NonNegativeInt = 0

    def at(self, step: int) -> float:
        """The decay at a step, counted from 1."""
        averaged = max(0, step - self.warmup)
        return min(self.decay, averaged / (averaged + 10))


class SourceSpec(Options):
    """One of several sources.

    name: a dataset, as --source takes it. weight: its share of the crops, all of them together 1;
        None, for all or for none of them: every source has the same share, whatever its size.
    """

    name: str
    weight: float | None = Field(default=None, ge=0.001, le=1)


def parse_sources(text: str) -> tuple[SourceSpec, ...]:
    """ "gta", "gta,synthia" or "gta=0.7,synthia=0.3". Raises ValueError for what is none of these
    and for weights that do not go together."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, given, weight = part.partition("=")
        try:
            number = float(weight) if given else None
        except ValueError:
            raise ValueError(
                f"the weight of '{name.strip()}' is a number such as 0.5, not '{weight.strip()}'"
            ) from None
        if number is not None and not 0.001 <= number <= 1:
            raise ValueError(
                f"the weight of '{name.strip()}' is its share of the crops, from 0.001 to 1, not "
                f"{weight.strip()}"
            )
        found.append(SourceSpec(name=name.strip(), weight=number))
    check_sources(found)
    return tuple(found)


def check_sources(sources: Sequence[SourceSpec]) -> None:
    """Raises ValueError where a name is given twice, or the weights are not shares of the whole."""
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"source '{twice[0]}' is given twice; give it once, with a larger weight if need be"
        )
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return
    if len(weights) < len(sources):
        without = next(source.name for source in sources if source.weight is None)
        raise ValueError(
            f"{len(weights)} of {len(sources)} sources have a weight, and '{without}' has none; "
            "give all of them one, or none for equal shares"
        )
    if abs(sum(weights) - 1) > ROUNDING:
        scaled = ", ".join(f"{w / sum(weights):.3g}" for w in weights)
        raise ValueError(
            f"the weights of the sources sum to {sum(weights):.4g}, not 1; in the same ratio they "
            f"are {scaled}"
        )


ROUNDING = 0.0015
"""Tolerated distance of the sum of weights from 1: three thirds written as 0.333 are accepted."""


def _sources(value: object) -> object:
    if isinstance(value, str):
        return parse_sources(value)
    if isinstance(value, list | tuple):
        return tuple({"name": one} if isinstance(one, str) else one for one in value)
    raise ValueError(f'takes a list such as ["gta", {{ name = "synthia", … }}], not {value!r}')


def _table(value: object) -> object:
    """ "encoder.vfm.norm" may be written as nested tables."""
    if isinstance(value, dict):
        return flat(value)
    raise ValueError(f"takes a table such as {{ decoder = 10 }}, not {value!r}")


def _number_or_table(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return flat(value)
    raise ValueError(f"takes a number or a table such as {{ default = 0.05 }}, not {value!r}")


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


_SEVERAL = BeforeValidator(_names)
Names = Annotated[tuple[str, ...], _SEVERAL]


class RecipeSpec(Declared):
    """How a pairing is trained and tested.

    steps: optimizer steps. batch_size: crops per step and process. accumulate: batches per step.
    lr: AdamW's learning rate.
    backbone_lr: multiplies the rate of what trains inside the encoders.
    lr_scale: multiplies the rate of what it names, in place of backbone_lr: components (vfm, vlm,
        tuning, fusion, merge, pyramid, enhancer, decoder, prompt, losses) and patterns of parameter
        or module names, e.g. { decoder = 10, "encoder.vfm.*.attn" = 0.1 }. The most specific entry
        counts: patterns before components, the longer pattern before the shorter.
    layer_decay: multiplies the rate inside the encoders by layer_decay ** (blocks - layer), the
        embeddings being layer 0 and block i layer i + 1 (BEiT, timm).
    weight_decay: AdamW's, a number or a table as lr_scale takes it, of decays instead of factors,
        with "default" for the rest: { default = 0.05, decoder = 0.01 }.
    no_decay: parameters whose name contains one of these are never decayed.
    decay_schedule: how the weight decay falls to min_weight_decay over all steps: "constant", not
        at all; "linear"; "cosine", half a cosine (annealed, as in SoMA).
    min_weight_decay: the decay that a falling schedule ends at.
    warmup: steps over which the rate rises linearly to what the schedule says.
    warmup_ratio: the share of the rate at the very first step, as mmcv counts; None: 1 / warmup,
        so that no step is lost on a rate of almost 0.
    lr_ramp: steps [begin, full] between which the rate of what it names rises, in place of warmup,
        by components and patterns as in lr_scale: { vfm = [2000, 5000] }. Until begin
        nothing of it moves.
    schedule: how the rate falls to min_lr over all steps: "poly", (1 - step / steps) ** power;
        "linear", the same with power 1; "cosine", half a cosine; "constant", not at all.
    schedule_from: the step from which it falls: "start", the first one (mmcv); "warmup", the end of
        the warm-up, or of the ramp of what lr_ramp names (EoMT).
    power: of "poly". min_lr: the rate that a falling schedule ends at.
    precision: of the forward pass, "no" is float32.
    frozen_dtype: the dtype in which frozen matrices of the encoders are stored and multiplied.
        "bfloat16" halves their memory; trained weights and the tokens between the matrices stay in
        float32. "auto": bfloat16 on GPUs that compute in it, else float32.
    checkpointing: compute activations of the encoders' blocks and adapters again in the backward
        pass: less memory, a third more time. "auto": for as many positions as free memory asks.
    shard: several processes share the weights, where a model does not fit into each of them; the
        result is the same.
    workers: processes that read and crop images, of one thread each; 0: the training one.
    prefetch: batches that each worker reads ahead.
    compile: true, or a table such as { parts = ["encoders"] }: torch.compile compiles the blocks of
        "encoders", "adapters" (with the enhancer) and "decoder"; mode = "reduce-overhead" records
        CUDA graphs, in inference alone. What cannot be compiled runs as it is, which is said.
    save_every: steps between checkpoints.
    source: used where the command names none; several share the crops equally ("gta,synthia") or
        by weight ("gta=0.7,synthia=0.3").
    targets: used where the command names none.
    sources: the same as source, as a list: [{ name = "gta", weight = 0.7 }, …], or as tables
        [[recipe.NAME.sources]].
    inference: how images of any size are segmented; None: by a sliding window, with `stride`.
    stride: of the sliding window; None: two thirds of the window. test_images: score only the
        first so many images of each target.
    scored: the classes that count, and that predictions are chosen among. "target": those that a
        target labels (16 of SYNTHIA, 11 of CamVid); "shared": only those that the source labels
        too; "all": every class of the pairing, as the released evaluation does. A class that is
        predicted but that a target never shows then counts as 0: figures for SYNTHIA over 16 and
        over 19 classes cannot be compared.
    on_bad_image: "stop", or "skip" an unreadable image and say so.
    baselines: the report after training also scores the untrained model.
    note: what the report should say besides its figures.
    ema: also average the trained weights over the steps; the averages are what is evaluated.
    validate_every: steps between measurements of what a report would evaluate, on held-out images
        of every source: its own val split, else at most a tenth of its images, which are then not
        trained on. The best weights are kept (`--weights best`).
    validate_images: at most so many images. validate_on: another dataset, a target perhaps; reports
        of the best weights then say so.
    weights: those that are evaluated, and taken where a command names none: "last", "averaged" or
        "best"; None: averaged ones with ema, else the last.
    tracker: "tensorboard", "wandb", "mlflow" or several of them (each needs the extra of its name):
        curves and example masks there, too. tensorboard: the same as tracker = "tensorboard".
    """

    steps: PositiveInt
    batch_size: PositiveInt = 2
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    backbone_lr: NonNegativeFloat = 1.0
    lr_scale: Annotated[dict[str, NonNegativeFloat], BeforeValidator(_table)] = {}
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    weight_decay: Annotated[
        NonNegativeFloat | dict[str, NonNegativeFloat], BeforeValidator(_number_or_table)
    ] = 1e-5
    no_decay: Names = ("norm", "level_embed", "query_embed")
    decay_schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_weight_decay: NonNegativeFloat = 0.0
    warmup: NonNegativeInt = 1500
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    lr_ramp: Annotated[dict[str, tuple[NonNegativeInt, PositiveInt]], BeforeValidator(_table)] = {}
    schedule: Literal["poly", "linear", "cosine", "constant"] = "poly"
    schedule_from: Literal["start", "warmup"] = "start"
    power: PositiveFloat = 0.9
    min_lr: NonNegativeFloat = 1e-6
    clip_grad: PositiveFloat | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool | Literal["auto"] = False
    shard: bool = False
    compile: Compilation = None
    augmentation: AugmentationSpec = AugmentationSpec()
    rare_classes: RareClassSpec | None = None
    seed: Seed = 0
    workers: NonNegativeInt = 2
    prefetch: PositiveInt = 2
    save_every: PositiveInt = 1000
    source: str | None = None
    sources: Annotated[tuple[SourceSpec, ...], BeforeValidator(_sources)] = ()
    targets: Names = ()
    inference: Annotated[SerializeAsAny[InferenceSpec] | None, component_of("inference")] = None
    stride: ImageSize | None = None
    test_images: PositiveInt | None = None
    scored: Literal["target", "shared", "all"] = "target"
    on_bad_image: Literal["stop", "skip"] = "stop"
    tensorboard: bool = False
    baselines: bool = False
    note: str = ""
    # What is seen of a training and kept beside its last weights.
    ema: AverageSpec | None = None
    validate_every: PositiveInt | None = None
    validate_images: PositiveInt = 40
    validate_on: str | None = None
    weights: Literal["last", "averaged", "best"] | None = None
    tracker: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], _SEVERAL] = ()

    @model_validator(mode="after")
    def _fits(self) -> RecipeSpec:
        if self.warmup >= self.steps and self.warmup > 0 and self.steps > 1:
            raise ValueError(
                f"warmup of {self.warmup} steps does not end within steps = {self.steps}; "
                "lower warmup"
            )
        for entry, (begin, full) in self.lr_ramp.items():
            if not begin < full <= self.steps:
                raise ValueError(
                    f"lr_ramp: '{entry}' rises from step {begin} to {full}; it takes [begin, full] "
                    f"with begin < full and full at most steps = {self.steps}"
                )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.validate_every is not None and self.validate_every > self.steps:
            raise ValueError(
                f"validate_every = {self.validate_every} is more than steps = {self.steps}; lower "
                "it, or leave it out"
            )
        if self.validate_on is not None and self.validate_every is None:
            raise ValueError(
                f"validate_on = '{self.validate_on}' does nothing without validate_every; give the "
                "steps between measurements"
            )
        if self.weights == "best" and self.validate_every is None:
            raise ValueError("weights = 'best' needs validate_every, which finds them")
        if self.weights == "averaged" and self.ema is None:
            raise ValueError("weights = 'averaged' needs ema, which makes them")
        if self.ema is not None and self.ema.warmup >= self.steps:
            raise ValueError(
                f"ema.warmup of {self.ema.warmup} steps leaves none of steps = {self.steps} to "
                "average; lower it"
            )
        if self.inference is not None and self.stride is not None:
            raise ValueError(
                f"'stride' is of the sliding window that is used without an inference, and "
                f"inference = '{self.inference.name}' is given; leave it out, or write inference = "
                '{ name = "sliding", stride = … }'
            )
        if self.source is not None and self.sources:
            raise ValueError("'source' and 'sources' are both given; leave one of them out")
        self.mixture()
        if isinstance(self.weight_decay, dict) and DEFAULT not in self.weight_decay:
            raise ValueError(
                f'weight_decay as a table needs "{DEFAULT}", the decay of all that it does not name'
            )
        if self.min_weight_decay > self.base_decay:
            raise ValueError(
                f"min_weight_decay {self.min_weight_decay} is above weight_decay {self.base_decay}"
            )
        return self

    def mixture(self) -> tuple[SourceSpec, ...]:
        """The sources that the recipe names. Raises ValueError if it is not a list of sources."""
        if self.source is not None:
            return parse_sources(self.source)
        check_sources(self.sources)
        return self.sources

    @property
    def trackers(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys([*self.tracker, *(["tensorboard"] if self.tensorboard else [])]))

    @property
    def base_decay(self) -> float:
        """The weight decay of what no table names."""
        given = self.weight_decay
        return given[DEFAULT] if isinstance(given, dict) else given

    @property
    def decays(self) -> dict[str, float]:
        """The weight decays by component and pattern, without the default."""
        given = self.weight_decay if isinstance(self.weight_decay, dict) else {}
        return {entry: decay for entry, decay in given.items() if entry != DEFAULT}

    def decay_at(self, decay: float, step: int) -> float:
        """A weight decay of this recipe as it is at a step (from 0)."""
        if self.decay_schedule == "constant":
            return decay
        floor = min(self.min_weight_decay, decay)  # what is not decayed stays so
        return floor + (decay - floor) * self._left(self.decay_schedule, step)

    @property
    def kind_of_weights(self) -> str:
        """The weights that are evaluated by default."""
        return self.weights or ("last" if self.ema is None else "averaged")

    def rate(self, step: int, ramp: tuple[int, int] | None = None) -> float:
        """The factor on `lr` at a step (from 0): linear warm-up, then decay to min_lr.

        The decay counts from step 0, so that warming up multiplies a rate that is falling already
        (mmcv's order), unless schedule_from says otherwise. ramp: of lr_ramp, in place of the
        warm-up.
        """
        begin, full = ramp or (0, self.warmup)
        if step < begin:
            return 0.0
        floor = self.min_lr / self.lr
        if self.schedule == "constant":
            factor = 1.0
        else:
            after = full if self.schedule_from == "warmup" else 0
            factor = floor + (1 - floor) * self._left(self.schedule, step, after)
        if step < full:
            done, length = step - begin, full - begin
            if self.warmup_ratio is None:
                factor *= (done + 1) / length
            else:
                factor *= self.warmup_ratio + (1 - self.warmup_ratio) * done / length
        return factor

    def _left(self, schedule: str, step: int, after: int = 0) -> float:
        """The remaining share of a falling schedule at a step, from 1 to 0; 1 until `after`."""
        left = 1 - max(0, step - after) / max(1, self.steps - after)
        if schedule == "poly":
            return float(left**self.power)
        return (1 - math.cos(math.pi * left)) / 2 if schedule == "cosine" else left
