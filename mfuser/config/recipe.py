"""What a recipe is: optimizer, schedule, augmentation, sampling, and how it is tested."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mfuser.data.transforms import AugmentationSpec
from mfuser.specs import ImageSize, Options

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""torch's generators take 63 bits."""


class RareClassSpec(Options):
    """Rare-class sampling (DAFormer, Hoyer et al. 2022, section 3.2).

    temperature: of the softmax over 1 - frequency; 0.01 strongly favors rare classes (DAFormer),
        100, as released, is nearly uniform over classes.
    min_pixels: what an image must show of a class to count as having it.
    """

    temperature: PositiveFloat = 100.0
    min_pixels: PositiveInt = 3000


def _names(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class RecipeSpec(Options):
    """How a pairing is trained and tested.

    steps: optimizer steps. batch_size: crops a step and process. accumulate: batches a step.
    lr, weight_decay, warmup (steps, linear), schedule, power, min_lr: AdamW's.
    backbone_lr: multiplies the rate of encoders that are not frozen.
    no_decay: parameters whose name contains one of these are not decayed.
    precision: of the forward pass, "no" is float32.
    checkpointing: recompute activations in the backward pass: less memory, a third more time.
    save_every: steps between checkpoints. source, targets: used where the command names none.
    stride: of the sliding window; None: two thirds of the window. test_images: score only the
        first so many images of each target. scored: every class that a target labels (as published
        figures are, SYNTHIA's too, which lacks three), or only those it shares with the source.
    on_bad_image: "stop", or "skip" an unreadable image and say so.
    tensorboard: also write event files (needs the extra of that name).
    baselines: the report after training also scores the untrained model.
    """

    steps: PositiveInt
    batch_size: PositiveInt = 2
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    backbone_lr: NonNegativeFloat = 1.0
    weight_decay: NonNegativeFloat = 1e-5
    no_decay: Names = ("norm", "level_embed", "level_encoding", "query_embed")
    warmup: NonNegativeInt = 1500
    schedule: Literal["poly", "linear", "constant"] = "poly"
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
    stride: ImageSize | None = None
    test_images: PositiveInt | None = None
    scored: Literal["target", "shared"] = "target"
    on_bad_image: Literal["stop", "skip"] = "stop"
    tensorboard: bool = False
    baselines: bool = False

    @model_validator(mode="after")
    def _fits(self) -> RecipeSpec:
        if self.warmup >= self.steps and self.warmup > 0 and self.steps > 1:
            raise ValueError(
                f"warmup of {self.warmup} steps does not end within steps = {self.steps}; "
                "lower warmup"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self

    def rate(self, step: int) -> float:
        """The factor on `lr` at a step (from 0): linear warm-up, then decay to min_lr."""
        floor = self.min_lr / self.lr
        left = 1 - step / self.steps
        decay = {"poly": left**self.power, "linear": left, "constant": 1.0}[self.schedule]
        factor = floor + (1 - floor) * decay if self.schedule != "constant" else 1.0
        if step < self.warmup:
            factor *= (step + 1) / self.warmup
        return factor
