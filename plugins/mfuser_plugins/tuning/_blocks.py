"""Which blocks of an encoder a tuning changes, and the training of what is there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import AfterValidator, NonNegativeInt, PositiveInt
from torch import nn

from mfuser import MFuserError, TuningSpec, VisionBackbone


def _ordered(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] >= value[1]:
        raise ValueError(f"blocks {list(value)} are none: the first number is the first block, "
                         "from 0, the second the one after the last")  # fmt: skip
    return value


Blocks = Annotated[tuple[NonNegativeInt, PositiveInt], AfterValidator(_ordered)]
"""The first block, from 0, and the one after the last."""


class BlocksSpec(TuningSpec):
    """blocks: [first, after the last], from 0, e.g. [8, 24]; None: all."""

    blocks: Blocks | None = None

    def chosen(self, backbone: VisionBackbone) -> list[nn.Module]:
        """The modules behind the chosen blocks. Raises MFuserError for more than there are."""
        modules = backbone.block_modules()
        if self.blocks is None:
            return modules
        if self.blocks[1] > len(modules):
            raise MFuserError(
                f"blocks {list(self.blocks)} go beyond the {len(modules)} that there are; choose "
                f"from [0, {len(modules)}], or tune one encoder alone (encoders)"
            )
        return modules[slice(*self.blocks)]


def train(blocks: list[nn.Module], wanted: Callable[[nn.Module, str], bool], what: str) -> int:
    """Let those of the blocks' parameters train that `wanted` picks by their module and their own
    name in it; returns how many numbers they hold.

    Raises MFuserError where there are none.
    """
    count = 0
    for block in blocks:
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if wanted(module, name):
                    if parameter.dtype in (torch.float16, torch.bfloat16):
                        raise MFuserError(
                            f"weights in {str(parameter.dtype).removeprefix('torch.')} cannot be "
                            "trained themselves: leave the backbone's dtype out, or use low-rank "
                            "updates (lora)"
                        )
                    parameter.requires_grad_(True)
                    count += parameter.numel()
    if not count:
        raise MFuserError(f"the encoder's blocks have no {what} to train")
    return count
