"""Low-rank updates of the encoders' linear layers (LoRA), beside any fusion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mfuser import MFuserError, TuningSpec, VisionBackbone, hookimpl
from mfuser_plugins.tuning._blocks import BlocksSpec
from mfuser_plugins.tuning._factors import Factors, minor_singular, pivoted, trained_like


class LowRank(nn.Module):
    """W + scale * B A, as a parametrization of the weight (Hu et al., arXiv 2106.09685).

    Of the weight and not of the layer's output, so that it holds however a library applies the
    weight (fused attention kernels never call the layer); the sum costs about rank / tokens of
    the layer's own multiplication.

    start: B and A before the first step; what they make is subtracted, W + scale * (B A - B0 A0):
        the frozen W stays the one that was loaded, and the first output its output to the last
        bit. B0 and A0 are saved, so that a checkpoint does not depend on a factorization that
        other machines round differently. None: B is zero.
    groups: equal shares of the rows, each with an update of its own (query, key and value).
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        start: Factors | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.scale, self.groups = scale, groups
        self.down = trained_like(weight, groups * rank, weight.shape[1])  # (groups * rank, in)
        self.up = trained_like(weight, weight.shape[0], rank)  # (out, rank)
        self.up_start: Tensor | None
        self.down_start: Tensor | None
        if start is None:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            nn.init.zeros_(self.up)
        else:
            self.up.data.copy_(start.up)
            self.down.data.copy_(start.down)
        self.register_buffer("up_start", None if start is None else self.up.detach().clone())
        self.register_buffer("down_start", None if start is None else self.down.detach().clone())

    def change(self) -> Tensor:
        """The update of the weight: (out, in)."""
        product = self._product(self.up, self.down)
        if self.up_start is not None and self.down_start is not None:
            product = product - self._product(self.up_start, self.down_start)
        return self.scale * product

    def _product(self, up: Tensor, down: Tensor) -> Tensor:
        if self.groups == 1:
            return up @ down
        shares = up.unflatten(0, (self.groups, -1)) @ down.unflatten(0, (self.groups, -1))
        return shares.flatten(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.change().to(weight.dtype)


class TwoLowRank(nn.Module):
    """W + the changes of a main and of a second, smaller adapter (RecycleLoRA)."""

    def __init__(self, main: LowRank, second: LowRank) -> None:
        super().__init__()
        self.main, self.second = main, second

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.main.change() + self.second.change()).to(weight.dtype)


def linear_weights(block: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path within the block, module and name of each linear map's weight: "attn.qkv", "mlp.fc1".

    Those of torch's own attention are "attn.in_proj" and "attn.out_proj".
    """
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module, "weight"
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield f"{path}.in_proj".lstrip("."), module, "in_proj_weight"


def biases(block: nn.Module, path: str, module: nn.Module, weight: str) -> Iterator[nn.Parameter]:
    """The biases of that linear map; EVA's attention holds q_bias and v_bias itself."""
    own = getattr(module, weight.replace("weight", "bias"))
    if isinstance(own, nn.Parameter):
        yield own
    parent, _, last = path.rpartition(".")
    if last == "qkv":
        for name, parameter in block.get_submodule(parent).named_parameters(recurse=False):
            if name in ("q_bias", "k_bias", "v_bias"):
                yield parameter


FUSED = ("qkv", "in_proj")
"""The last part of the path of layers that make query, key and value at once."""


class LoraSpec(BlocksSpec, name="lora"):
    """LoRA: trained low-rank updates of the linear layers in the encoders' blocks.

    encoders: ["vfm"], ["vlm"]; None: every encoder of the pairing. Text encoders are not changed.
    rank: of the updates. alpha: updates are scaled by alpha / rank; None: by 1.
    layers: patterns of the layers' paths within a block, as the library names them: "*",
        "*attn*", "mlp.*", "attn.qkv".
    blocks: [first, after the last], from 0, e.g. [8, 24]; None: all.
    init: "default": the update starts at zero, from random directions. "svd_minor": the smallest
        singular components of each weight train, the others stay frozen (SoMA, CVPR 2025,
        arXiv 2412.04077). "rrqr": two adapters, on the minor and on the major directions of a
        rank-revealing QR decomposition (RecycleLoRA, CVPR 2026 Findings, arXiv 2603.28142). The
        encoder's output before the first step is that of the frozen encoder in each case.
    second_rank: of "rrqr", how much of the rank is the second adapter's, on the major directions.
    split: query, key and value get updates of their own where a library makes them in one layer.
    biases: the biases of those layers train too.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"rank": 2}

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    layers: tuple[str, ...] = ("*",)
    init: Literal["default", "svd_minor", "rrqr"] = "default"
    second_rank: PositiveInt | None = None
    split: bool = False
    biases: bool = False

    @model_validator(mode="after")
    def _shares_rank(self) -> LoraSpec:
        if (self.init == "rrqr") != (self.second_rank is not None):
            raise ValueError('"rrqr" and second_rank go together: two adapters share the rank')
        if self.second_rank is not None and self.second_rank >= self.rank:
            raise ValueError(
                f"second_rank {self.second_rank} leaves nothing of rank {self.rank} to the main "
                "adapter"
            )
        return self

    def build(self, backbone: VisionBackbone) -> None:
        """Raises MFuserError for a pattern that fits no layer, naming what there is, for a rank
        that a weight does not have, and for a backbone that declares no blocks."""
        known: dict[str, None] = {}
        fitting: set[str] = set()
        for block in self.chosen(backbone):
            for path, module, name in list(linear_weights(block)):
                known[path] = None
                fits = [pattern for pattern in self.layers if fnmatch(path, pattern)]
                fitting.update(fits)
                if fits and not parametrize.is_parametrized(module, name):
                    for bias in biases(block, path, module, name) if self.biases else ():
                        bias.requires_grad_(True)
                    update = self.update(getattr(module, name), path)
                    parametrize.register_parametrization(module, name, update)
        unused = [pattern for pattern in self.layers if pattern not in fitting]
        if unused:
            raise MFuserError(
                f"layers: '{unused[0]}' fits no linear layer; there are "
                f'{", ".join(known) or "none"} in a block (patterns such as "*attn*" or '
                '"mlp.*")'
            )

    def update(self, weight: Tensor, path: str) -> LowRank | TwoLowRank:
        """The parametrization of one weight (out, in)."""
        rows, columns = weight.shape
        fused = path.rpartition(".")[2] in FUSED and rows == 3 * columns
        groups = 3 if self.split and fused else 1
        scale = (self.alpha or float(self.rank)) / self.rank
        if self.init == "default":
            return LowRank(weight, self.rank, scale, groups=groups)
        most = min(rows // groups, columns)
        if self.rank > most:
            raise MFuserError(
                f"rank {self.rank} is more than layer '{path}' has, {most} ({rows // groups} x "
                f"{columns}); lower it"
            )
        if self.second_rank is None:
            start = minor_singular(weight, self.rank, scale, groups)
            return LowRank(weight, self.rank, scale, start, groups)
        rank = self.rank - self.second_rank
        minor, major = pivoted(weight, rank, self.second_rank, groups)
        return TwoLowRank(
            LowRank(weight, rank, scale, minor, groups),
            LowRank(weight, self.second_rank, scale, major, groups),
        )


@hookimpl
def mfuser_components() -> list[type[TuningSpec]]:
    return [LoraSpec]
