"""timm's staged models through their longest stage: Swin, Swin v2, ConvNeXt, Hiera.

The stem, the stages before and the downsampling that opens the longest one are `embed`; its blocks
are the blocks; what follows is left out. To a fusion they are a ViT with a convolutional stem.
"""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models import hiera
from torch import Tensor, nn

from mfuser import MFuserError
from mfuser_plugins.backbones._resample import resample_positions
from mfuser_plugins.backbones._stepping import Size
from mfuser_plugins.backbones._timm import Tensors, TimmStepper


def longest(lengths: list[int]) -> int:
    """The index of the longest stage; the first of equals."""
    return max(range(len(lengths)), key=lambda i: lengths[i])


class StagedStepper(TimmStepper):
    """Stages in the attribute `stages`, the longest last once stripped. The grid is the state."""

    stages: ClassVar[str] = "layers"
    any_prefix = False
    has_table = False

    @classmethod
    def strip(cls, model: Any) -> Any:
        stages = getattr(model, cls.stages)
        last = longest([len(stage.blocks) for stage in stages])
        setattr(model, cls.stages, stages[: last + 1])
        # Their widths are those of the last stage.
        model.norm = model.head = nn.Identity()
        return model

    @classmethod
    def keep(cls, model: Any, depth: int) -> None:
        stage = getattr(model, cls.stages)[-1]
        stage.blocks = stage.blocks[:depth]

    @property
    def _stages(self) -> Any:
        return getattr(self.model, self.stages)

    @property
    def blocks(self) -> Any:
        return self._stages[-1].blocks

    def _width(self) -> int:
        return int(self.model.feature_info[len(self._stages) - 1]["num_chs"])

    def _default_size(self) -> tuple[Size, Size]:
        stride = int(self.model.feature_info[len(self._stages) - 1]["reduction"])
        # The stem's kernel does not cover a whole patch, so it is not resampled.
        self.plain = False
        return self._library_size(stride), (stride, stride)

    def _library_size(self, stride: int) -> Size:
        h, w = self._stem.img_size
        return int(h), int(w)

    def _channels_last(self, maps: Tensor) -> Tensor:
        """Output of the preceding stages -> (B, h, w, D), the layout of the blocks."""
        return maps

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        maps = self._stem(images)
        for stage in self._stages[:-1]:
            maps = stage(maps)
        maps = self._stages[-1].downsample(self._channels_last(maps))
        return self._to_tokens(maps)

    def _to_tokens(self, maps: Tensor) -> tuple[Tensor, Any]:
        return maps.flatten(1, 2), tuple(maps.shape[1:3])

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.blocks[i](tokens.unflatten(1, state)).flatten(1, 2)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return tokens


class SwinStepper(StagedStepper):
    """Swin and Swin v2. The windows keep the size they were trained with (timm would scale them
    with the image); maps that do not fill them are padded."""

    def __init__(self, model: Any, how: Any) -> None:
        self.windows = [tuple(s.blocks[0].window_size) for s in getattr(model, self.stages)]
        super().__init__(model, how)

    def no_extra(self) -> str | None:
        return "its blocks attend within windows"

    def grid_of(self, size: Size) -> Size:
        patch = self._stem.patch_size
        h, w = size[0] // patch[0], size[1] // patch[1]
        for stage in self._stages:
            if not isinstance(stage.downsample, nn.Identity):
                h, w = (h + 1) // 2, (w + 1) // 2
        return h, w

    def _resize(self, size: Size, patch_size: Size) -> None:
        # The model's own set_input_size needs the stages that were removed.
        self._stem.set_input_size(img_size=size)
        h, w = self._stem.grid_size
        for i, (stage, window) in enumerate(zip(self._stages, self.windows, strict=True)):
            scale = 2 ** max(i - 1, 0)
            stage.set_input_size((-(-h // scale), -(-w // scale)), window)


class SwinCrStepper(SwinStepper):
    """Swin v2-CR: the stages hand on (B, D, h, w), their blocks take (B, h, w, D)."""

    stages = "stages"

    def _channels_last(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1)


class ConvNeXtStepper(StagedStepper):
    """ConvNeXt and ConvNeXt v2: (B, D, h, w) throughout; any size as it is."""

    stages = "stages"

    def no_extra(self) -> str | None:
        return "its blocks are convolutions"

    @classmethod
    def strip(cls, model: Any) -> Any:
        model.norm_pre = nn.Identity()
        return super().strip(model)

    @property
    def _stem(self) -> Any:
        return self.model.stem

    def _library_size(self, stride: int) -> Size:
        return 14 * stride, 14 * stride

    def grid_of(self, size: Size) -> Size:
        modules = [self._stem, *(stage.downsample for stage in self._stages)]
        convolutions = [m for part in modules for m in part.modules() if isinstance(m, nn.Conv2d)]
        h, w = size
        for c in convolutions:
            h = (h + 2 * int(c.padding[0]) - c.kernel_size[0]) // c.stride[0] + 1
            w = (w + 2 * int(c.padding[1]) - c.kernel_size[1]) // c.stride[1] + 1
        return h, w

    def _to_tokens(self, maps: Tensor) -> tuple[Tensor, Any]:
        return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        maps = tokens.transpose(1, 2).unflatten(2, state)
        return self.blocks[i](maps).flatten(2).transpose(1, 2)

    def _resize(self, size: Size, patch_size: Size) -> None:
        pass


class HieraStepper(TimmStepper):
    """Hiera. The first block of the longest stage pools and widens, so it belongs to `embed`. The
    others attend globally, so tokens may stand row by row instead of by mask unit."""

    any_prefix = False
    has_table = False
    UNIT = 32
    """Pixels of a mask unit: 8 x 8 tokens of 4 pixels."""

    def __init__(self, model: Any, how: Any) -> None:
        self.opening = model.stage_ends[self._stage(model) - 1] + 1
        super().__init__(model, how)
        if any(block.attn.use_mask_unit_attn for block in self.blocks):
            raise MFuserError(
                "this Hiera attends within mask units in its longest stage; only those that attend "
                "globally there can be stepped on a grid"
            )

    @staticmethod
    def _stage(model: Any) -> int:
        ends = [-1, *model.stage_ends]
        return longest([b - a for a, b in zip(ends, ends[1:], strict=False)])

    @classmethod
    def strip(cls, model: Any) -> Any:
        model.blocks = model.blocks[: model.stage_ends[cls._stage(model)] + 1]
        model.head = nn.Identity()
        return model

    @classmethod
    def keep(cls, model: Any, depth: int) -> None:
        model.blocks = model.blocks[: model.stage_ends[cls._stage(model) - 1] + 2 + depth]

    @property
    def blocks(self) -> Any:
        return self.model.blocks[self.opening + 1 :]

    def _width(self) -> int:
        return int(self.model.feature_info[self._stage(self.model)]["num_chs"])

    def _default_size(self) -> tuple[Size, Size]:
        model = self.model
        h, w = (t * s for t, s in zip(model.tokens_spatial_shape, model.patch_stride, strict=True))
        stride = int(model.feature_info[self._stage(model)]["reduction"])
        return (h, w), (stride, stride)

    def _table_names(self) -> list[str]:
        return ["pos_embed"]

    def grid_of(self, size: Size) -> Size:
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def _resize(self, size: Size, patch_size: Size) -> None:
        if size[0] % self.UNIT or size[1] % self.UNIT:
            raise MFuserError(
                f"Hiera takes images of whole mask units, multiples of {self.UNIT} pixels; "
                f"{size[0]}x{size[1]} is not"
            )
        model, table = self.model, self.model.pos_embed
        stride, schedule = model.patch_stride, model.unroll.schedule
        h, w = (n // s for n, s in zip(size, stride, strict=True))
        model.tokens_spatial_shape = [h, w]
        unit = model.mask_unit_size
        model.mask_spatial_shape = [h // unit[0], w // unit[1]]
        model.unroll = hiera.Unroll(size, stride, schedule).eval()
        model.reroll = hiera.Reroll(size, stride, schedule, model.stage_ends, model.q_pool).eval()
        if model.pos_embed_win is None and table.shape[1] != h * w:
            model.pos_embed = nn.Parameter(
                table.new_empty(1, h * w, table.shape[2]), requires_grad=table.requires_grad
            )

    def _fill(self, source: Tensors, source_grid: Size) -> None:
        model, table = self.model, source["pos_embed"]
        if model.pos_embed_win is not None:
            # Interpolated in every forward, as published.
            return
        old, new = ((4 * h, 4 * w) for h, w in (source_grid, self.grid_of(self.image_size)))
        model.pos_embed.copy_(resample_positions(table[0], old, new, 0, self.how)[None])

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        model = self.model
        # Private, but the only place where timm adds positions before the blocks.
        tokens = model.unroll(model._pos_embed(model.patch_embed(images)))
        for block in model.blocks[: self.opening + 1]:
            tokens = block(tokens)
        return model.reroll(tokens, self.opening).flatten(1, 2), None

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[self.opening + 1 + i](tokens)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return tokens
