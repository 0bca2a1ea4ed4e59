"""Recipes: optimizer, schedule, augmentation, sampling, and how the result is tested."""

from __future__ import annotations

import math
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

from mfuser.data.transforms import AugmentationSpec
from mfuser.specs import ImageSize, InferenceSpec, Options, component_of

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""torch's generators take 63 bits."""


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

    decay: what a step keeps of the average. It is reached slowly, lest the weights of the start
        weigh on short runs: n steps after the warm-up it is at most n / (n + 10).
    warmup: steps before averaging begins; until then the average is the weights themselves.
    """

    decay: float = Field(default=0.999, ge=0, lt=1)
    warmup: NonNegativeInt = 0

    def at(self, step: int) -> float:
        """The decay at a step, counted from 1."""
        averaged = max(0, step - self.warmup)
        return min(self.decay, averaged / (averaged + 10))


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


_SEVERAL = BeforeValidator(_names)
Names = Annotated[tuple[str, ...], _SEVERAL]


class RecipeSpec(Options):
    """How a pairing is trained and tested.

    steps: optimizer steps. batch_size: crops per step and process. accumulate: batches per step.
    lr, weight_decay: AdamW's.
    backbone_lr: multiplies the rate of encoders that are not frozen.
    no_decay: parameters whose name contains one of these are not decayed.
    warmup: steps over which the rate rises linearly to what the schedule says.
    warmup_ratio: the share of the rate at the very first step, as mmcv counts; None: 1 / warmup,
        so that no step is lost on a rate of almost 0.
    schedule: how the rate falls to min_lr over all steps: "poly", (1 - step / steps) ** power;
        "linear", the same with power 1; "cosine", half a cosine; "constant", not at all.
    power: of "poly". min_lr: the rate that a falling schedule ends at.
    precision: of the forward pass, "no" is float32.
    checkpointing: recompute activations in the backward pass: less memory, a third more time.
    save_every: steps between checkpoints. source, targets: used where the command names none.
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
        of the source: its own val split, else at most a tenth of its images, which are then not
        trained on. The best weights are kept (`--weights best`).
    validate_images: at most so many images. validate_on: another dataset, a target perhaps; reports
        of the best weights then say so.
    tracker: "tensorboard", "wandb", "mlflow" or several of them (each needs the extra of its name):
        curves and example masks there, too. tensorboard: the same as tracker = "tensorboard".
    """

    steps: PositiveInt
    batch_size: PositiveInt = 2
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    backbone_lr: NonNegativeFloat = 1.0
    weight_decay: NonNegativeFloat = 1e-5
    no_decay: Names = ("norm", "level_embed", "query_embed")
    warmup: NonNegativeInt = 1500
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    schedule: Literal["poly", "linear", "cosine", "constant"] = "poly"
    power: PositiveFloat = 0.9
    min_lr: NonNegativeFloat = 1e-6
    clip_grad: PositiveFloat | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpointing: bool = False
    augmentation: AugmentationSpec = AugmentationSpec()
    rare_classes: RareClassSpec | None = None
    seed: Seed = 0
    workers: NonNegativeInt = 2
    save_every: PositiveInt = 1000
    source: str | None = None
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
    tracker: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], _SEVERAL] = ()

    @model_validator(mode="after")
    def _fits(self) -> RecipeSpec:
        if self.warmup >= self.steps and self.warmup > 0 and self.steps > 1:
            raise ValueError(
                f"warmup of {self.warmup} steps does not end within steps = {self.steps}; "
                "lower warmup"
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
        return self

    @property
    def trackers(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys([*self.tracker, *(["tensorboard"] if self.tensorboard else [])]))

    def rate(self, step: int) -> float:
        """The factor on `lr` at a step (from 0): linear warm-up, then decay to min_lr.

        The decay counts from step 0, so that warming up multiplies a rate that is falling already
        (mmcv's order).
        """
        floor = self.min_lr / self.lr
        left = 1 - step / self.steps
        if self.schedule == "constant":
            factor = 1.0
        else:
            decay = {
                "poly": left**self.power,
                "linear": left,
                "cosine": (1 - math.cos(math.pi * left)) / 2,
            }[self.schedule]
            factor = floor + (1 - floor) * decay
        if step < self.warmup:
            if self.warmup_ratio is None:
                factor *= (step + 1) / self.warmup
            else:
                factor *= self.warmup_ratio + (1 - self.warmup_ratio) * step / self.warmup
        return factor
