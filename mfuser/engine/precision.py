"""The precision of a command on its device: frozen weights, autocast, products by TF32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mfuser.config.recipe import RecipeSpec
from mfuser.errors import MFuserError
from mfuser.inference import Inference, Network
from mfuser.model.dgss import DGSSModel
from mfuser.model.precision import frozen_bytes, lower

Choice = Literal["auto", "no", "bf16", "fp16"]
"""--precision of evaluation and prediction."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision of a recipe -> what autocast computes in."""
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Precision:
    """autocast: what everything is multiplied in; None: float32. frozen: what the frozen matrices
    of the encoders are held and multiplied in; None: float32. tf32: products of float32 by TF32,
    with ten bits after the leading one, as CUDA's matrix units take them."""

    device: torch.device
    autocast: torch.dtype | None = None
    frozen: torch.dtype | None = None
    tf32: bool = False

    @staticmethod
    def of_training(recipe: RecipeSpec, device: torch.device) -> Precision:
        """Raises MFuserError for a precision that the device does not compute in."""
        check_precision(recipe.precision, device, "--set-recipe precision=no")
        frozen = _frozen(recipe.frozen_dtype, device)
        return Precision(device, DTYPES.get(recipe.precision), frozen, device.type == "cuda")

    @staticmethod
    def of_inference(device: torch.device, run: Any, asked: Choice = "auto") -> Precision:
        """run: the record of the run as a file holds it. asked: "auto": that of the training on
        CUDA, and elsewhere float32 but for frozen weights that its recipe asks to be half; else one
        for all. Raises MFuserError as above."""
        if asked != "auto":
            check_precision(asked, device, "--precision no")
            return Precision(device, DTYPES.get(asked), DTYPES.get(asked))
        found = run.get("recipe") if isinstance(run, Mapping) else None
        recipe = found if isinstance(found, Mapping) else {}
        cuda = device.type == "cuda"
        autocast = DTYPES.get(str(recipe.get("precision"))) if cuda else None
        return Precision(device, autocast, _frozen(recipe.get("frozen_dtype"), device), cuda)

    def prepare(self, model: DGSSModel) -> DGSSModel:
        """Bring a model to the device, its frozen weights lowered first; set TF32."""
        self.settle(model)
        return model.to(self.device)

    def settle(self, model: DGSSModel) -> None:
        """The same for a model that is brought to its device otherwise."""
        if self.frozen is not None:
            lower(model, self.frozen)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32

    def around(self, inference: Inference) -> Inference:
        """The inference, under autocast where there is one."""
        return inference if self.autocast is None else _Autocast(inference, self)

    def __str__(self) -> str:
        """ "bfloat16", "float32 by TF32, frozen weights in bfloat16"."""
        rest = "float32 by TF32" if self.tf32 else "float32"
        rest = rest if self.autocast is None else NAMES[self.autocast]
        if self.frozen is None or self.frozen == self.autocast:
            return rest
        return f"{rest}, frozen weights in {NAMES[self.frozen]}"

    def said(self, model: DGSSModel) -> str | None:
        """A line for people; None where all is as it always is."""
        if self.frozen is None and self.device.type == "cpu":
            return None
        held = frozen_bytes(model) / 1e9
        return f"computes in {self} on {self.device.type}; frozen weights take {held:.2f} GB"


class _Autocast(Inference):
    def __init__(self, inference: Inference, precision: Precision) -> None:
        self.inference, self.precision = inference, precision
        self.window_batch = getattr(inference, "window_batch", 1)  # named where memory runs out

    def __call__(self, network: Network, images: Tensor) -> Tensor:
        with torch.autocast(self.precision.device.type, self.precision.autocast):
            return self.inference(network, images)

    def check(self, network: Network, size: tuple[int, int]) -> None:
        self.inference.check(network, size)


def check_precision(precision: str, device: torch.device, way_on: str) -> None:
    """Raises MFuserError for what the device has no arithmetic for. A CPU would train float16 in
    float32 instead."""
    if precision == "fp16" and device.type == "cpu":
        raise MFuserError(
            'precision = "fp16" needs a GPU, and this runs on a CPU; set precision = "bf16" or '
            f'"no" ({way_on})'
        )
    if precision == "bf16" and device.type == "cuda" and not computes(device):
        raise MFuserError(
            f'precision = "bf16": {torch.cuda.get_device_name(device)} has no arithmetic for '
            f'bfloat16; set precision = "fp16" or "no" ({way_on})'
        )


def computes(device: torch.device) -> bool:
    """Whether a CUDA device computes in bfloat16 itself (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _frozen(asked: Any, device: torch.device) -> torch.dtype | None:
    half = computes(device) if asked in (None, "auto") else asked == "bfloat16"
    return torch.bfloat16 if half else None
