"""Shared by the built-in backbones: a stepper per model family and the backbone around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mfuser import MFuserError, Stream, VisionBackbone

Size = tuple[int, int]

FIXED_BIAS = "the bias of its attention is of a fixed number of tokens"
"""Why models with tables of relative positions take no further tokens."""


class Stepper(ABC):
    """Steps the models of one family block by block; written against the library's class.

    It refers to the model and owns no parameters. `tables` names the parameters whose shape depends
    on the image or patch size.
    """

    embed_dim: int
    depth: int
    num_prefix_tokens: int

    def __init__(self, size: Size, patch_size: Size, tables: list[str]) -> None:
        self.image_size, self.patch_size = size, patch_size
        self._names = tables
        self._source: dict[str, Tensor] = {}
        self._written: dict[str, Tensor] = {}
        self._source_size = (size, patch_size)
        self._keep_source()

    @property
    @abstractmethod
    def sized(self) -> nn.Module:
        """The module that holds the tables."""

    @abstractmethod
    def grid_of(self, size: Size) -> Size:
        """Patch grid (h, w) of an image; partial patches at the right and bottom are cropped."""

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        """(B, 3, H, W) -> tokens before the first block, state."""

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """The library's modules that `block` runs, a sequence."""

    @abstractmethod
    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor: ...

    def no_extra(self) -> str | None:
        """Why further tokens cannot join the blocks; None: they can, by `joint_block`."""
        return "its blocks are made for its own tokens alone"

    def joint_block(
        self, i: int, tokens: Tensor, state: Any, extra: int, attends: Tensor | None
    ) -> Tensor:
        """`block` on (B, N + extra, D), further tokens between prefix and patches.

        attends: (B, 1, N + extra, N + extra), bool: which token (row) attends to which (column).
        """
        raise NotImplementedError

    @abstractmethod
    def _resize(self, size: Size, patch_size: Size) -> None:
        """Resize the tables for another image or patch size; `_fill` sets their values."""

    @abstractmethod
    def _fill(self, source: dict[str, Tensor], source_grid: Size) -> None:
        """Resample the tables from `source`, whose positions are of `source_grid`."""

    def resize(self, size: Size, patch_size: Size) -> None:
        """Resample for another image or patch size, always from the tables as loaded.

        Tables that changed since (trained, or loaded from a checkpoint) become the new originals.
        """
        if (size, patch_size) == (self.image_size, self.patch_size):
            return
        tables = self._tables()
        # On the meta device (a model laid out without weights) there are no values to compare.
        if any(not v.is_meta and _differs(v, self._written[k]) for k, v in tables.items()):
            self._keep_source()
        source, (source_size, source_patch) = self._source, self._source_size
        with torch.no_grad():
            self._resize(source_size, source_patch)
            for name, value in source.items():
                self.sized.get_parameter(name).copy_(value)
            source_grid = self.grid_of(source_size)
            self._resize(size, patch_size)
            self.image_size, self.patch_size = size, patch_size
            self._fill(source, source_grid)
        self._written = self._tables()

    def _tables(self) -> dict[str, Tensor]:
        tables = {n: self.sized.get_parameter(n).detach() for n in self._names}
        return {n: t.clone() if t.is_meta else t.cpu().clone() for n, t in tables.items()}

    def _keep_source(self) -> None:
        self._source = self._written = self._tables()
        self._source_size = (self.image_size, self.patch_size)


def _differs(now: Tensor, written: Tensor) -> bool:
    return written.is_meta or not torch.equal(now, written)


class Stepped(VisionBackbone):
    """A library model (`model`) behind a stepper.

    Raises MFuserError if not one patch fits into `image_size`.
    """

    def __init__(self, model: nn.Module, stepper: Stepper) -> None:
        super().__init__()
        self.model = model
        self.stepper = stepper
        self.embed_dim = stepper.embed_dim
        self.depth = stepper.depth
        self.num_prefix_tokens = stepper.num_prefix_tokens
        self._take_size()
        self.eval()

    def _take_size(self) -> None:
        self.image_size = self.stepper.image_size
        self.patch_size = self.stepper.patch_size
        self.grid = self.stepper.grid_of(self.image_size)

    def resize(self, image_size: Size, patch_size: int | None = None) -> None:
        """See VisionBackbone.resize. Parameters are replaced: make optimizers afterwards."""
        size = (int(image_size[0]), int(image_size[1]))
        patch = self.patch_size if patch_size is None else (patch_size, patch_size)
        if min(size[0] // patch[0], size[1] // patch[1]) < 1:
            raise MFuserError(
                f"an image of {size[0]}x{size[1]} holds no patch of {patch[0]}x{patch[1]} pixels; "
                "use a larger image_size or a smaller patch_size"
            )
        self.stepper.resize(size, patch)
        self._take_size()

    def embed(self, images: Tensor) -> Stream:
        check_size(images, self.image_size)
        tokens, state = self.stepper.embed(images)
        return Stream(tokens, self.grid, state)

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.stepper.block(i, tokens, state)

    def no_extra(self) -> str | None:
        return self.stepper.no_extra()

    def block_with(
        self, i: int, tokens: Tensor, state: Any, extra: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        first, count = self.num_prefix_tokens, extra.shape[1]
        joint = torch.cat([tokens[:, :first], extra, tokens[:, first:]], 1)
        attends = None
        if visible is not None:
            rows = joint.shape[1]
            attends = visible.new_ones(len(joint), 1, rows, rows)
            attends[:, 0, first : first + count, first + count :] = visible
        joint = self.stepper.joint_block(i, joint, state, count, attends)
        prefix, extra, patches = joint.split([first, count, joint.shape[1] - first - count], 1)
        return torch.cat([prefix, patches], 1), extra

    def block_modules(self) -> list[nn.Module]:
        return list(self.stepper.blocks)


def unmasked(blocks: Any) -> str | None:
    """The reason where blocks of the library take no mask of attention."""
    kinds = {type(block) for block in blocks}
    lacking = [k.__name__ for k in kinds if "attn_mask" not in signature(k.forward).parameters]
    return f"its blocks ({lacking[0]}) take no mask of attention" if lacking else None


def check_size(images: Tensor, size: Size) -> None:
    """Raises MFuserError unless images are (B, 3, *size)."""
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, *size):
        raise MFuserError(
            f"the backbone is set to images of (B, 3, {size[0]}, {size[1]}) and was given "
            f"{tuple(images.shape)}; resize the images, or the backbone with resize()"
        )


def freeze(module: nn.Module, frozen: bool) -> None:
    """Freeze `module`, or leave its parameters as the library set them."""
    if frozen:
        module.requires_grad_(False)
