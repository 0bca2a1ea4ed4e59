"""Low-rank updates of the encoders' linear layers (LoRA), beside any fusion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, ClassVar

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mfuser import MFuserError, TuningSpec, VisionBackbone, hookimpl


class LowRank(nn.Module):
    """W + (alpha / rank) B A, as a parametrization of the weight (Hu et al., arXiv 2106.09685).

    Of the weight and not of the layer's output, so that it holds however a library applies the
    weight (fused attention kernels never call the layer); the sum costs about rank / tokens of
    the layer's own multiplication. B starts at zero, and with it the update.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1], requires_grad=True))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank, requires_grad=True))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def linear_weights(block: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path within the block, module and name of each linear map's weight: "attn.qkv", "mlp.fc1".

    Those of torch's own attention are "attn.in_proj" and "attn.out_proj".
    """
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module, "weight"
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield f"{path}.in_proj".lstrip("."), module, "in_proj_weight"


def tune(backbone: VisionBackbone, layers: tuple[str, ...], rank: int, alpha: float) -> int:
    """Add low-rank updates to the weights whose path fits a pattern; returns how many.

    Raises MFuserError for a pattern that fits none, naming what there is, and for a backbone that
    declares no blocks.
    """
    known: dict[str, None] = {}
    fitting: set[str] = set()
    count = 0
    for block in backbone.block_modules():
        for path, module, name in list(linear_weights(block)):
            known[path] = None
            fits = [pattern for pattern in layers if fnmatch(path, pattern)]
            fitting.update(fits)
            if fits and not parametrize.is_parametrized(module, name):
                weight = getattr(module, name)
                parametrize.register_parametrization(module, name, LowRank(weight, rank, alpha))
                count += 1
    unused = [pattern for pattern in layers if pattern not in fitting]
    if unused:
        raise MFuserError(
            f"layers: '{unused[0]}' fits no linear layer; there are {', '.join(known) or 'none'} "
            'in a block (patterns such as "*attn*" or "mlp.*")'
        )
    return count


def merge(model: nn.Module) -> nn.Module:
    """Fold the updates into the weights, in place: for inference, the same values without them.

    The model keeps its outputs and loses what could be trained or saved of the updates.
    """
    for module in model.modules():
        for name, chain in list(getattr(module, "parametrizations", {}).items()):
            if all(isinstance(part, LowRank) for part in chain):
                frozen = not chain.original.requires_grad
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                getattr(module, name).requires_grad_(not frozen)
    return model


class LoraSpec(TuningSpec, name="lora"):
    """LoRA: trained low-rank updates of the linear layers in the encoders' blocks.

    encoders: ["vfm"], ["vlm"]; None: every encoder of the pairing. Text encoders are not changed.
    rank: of the updates. alpha: updates are scaled by alpha / rank; None: by 1.
    layers: patterns of the layers' paths within a block, as the library names them: "*",
        "*attn*", "mlp.*", "attn.qkv".
    """

    tiny: ClassVar[Mapping[str, Any]] = {"rank": 2}

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    layers: tuple[str, ...] = ("*",)

    def build(self, backbone: VisionBackbone) -> None:
        tune(backbone, self.layers, self.rank, self.alpha or float(self.rank))


@hookimpl
def mfuser_components() -> list[type[TuningSpec]]:
    return [LoraSpec]
