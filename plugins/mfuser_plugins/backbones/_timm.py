"""timm's vision transformers, stepped: the base of all, and the ViT, EVA and BEiT families.

timm's public methods run all blocks at once, and there is no public way to the tokens before the
first: here and in the modules beside `_pos_embed` (`_forward_embeds` in NaFlexVit) is called though
private. The tests compare every family with the library's own forward.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from timm.layers import PatchEmbed
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from mfuser import MFuserError, Stream
from mfuser_plugins.backbones._resample import Resampling, resample_kernel, resample_positions
from mfuser_plugins.backbones._stepping import FIXED_BIAS, Size, Stepped, Stepper, unmasked

Tensors = dict[str, Tensor]

SPARE = (
    r"(head|head_dist|lm_head|cls_pt_layers)\."
    r"|(loss\w*|criterion|decode_head|auxiliary_head|\w+_head|projector|predictor|prototypes)\."
    r"|decoder_\w+"
    r"|mask_token$|masked_embed$|.*relative_position_index$"
)
"""Classifiers, heads and decoders of pretraining, losses, index buffers: not part of a backbone."""


class TimmStepper(Stepper):
    """Common to the families: `patch_embed`, `blocks`, `set_input_size`.

    model: as `strip` leaves it.
    """

    has_table: ClassVar[bool] = True
    """Whether the class has a `pos_embed`: a table, or None. Files saved at another size are
    then loaded at that size."""
    any_prefix: ClassVar[bool] = True
    """Whether the class has `num_prefix_tokens`; otherwise its blocks see no prefix tokens."""

    def __init__(self, model: Any, how: Resampling) -> None:
        self.model = model
        self.how = how
        self.embed_dim = self._width()
        self.depth = len(self.blocks)
        self.num_prefix_tokens = int(model.num_prefix_tokens) if self.any_prefix else 0
        # Convolutional stems (hybrids, ViTamin) have no kernel that could be resampled.
        self.plain = isinstance(self._stem, PatchEmbed)
        size, patch = self._default_size()
        super().__init__(size, patch, self._table_names())

    def _default_size(self) -> tuple[Size, Size]:
        """Image and patch size as the library built it."""
        return tuple(self._stem.img_size), tuple(self._stem.feat_ratio(as_scalar=False))

    def _width(self) -> int:
        return int(self.model.embed_dim)

    @property
    def blocks(self) -> Any:
        return self.model.blocks

    @property
    def _stem(self) -> Any:
        """The module that turns images into patches."""
        return self.model.patch_embed

    def _table_names(self) -> list[str]:
        tables = ["patch_embed.proj.weight"] if self.plain else []
        if self.has_table and self.model.pos_embed is not None:
            tables.append("pos_embed")
        named = self.model.named_parameters()
        return tables + [n for n, _ in named if n.endswith("position_bias_table")]

    @staticmethod
    def strip(model: Any) -> Any:
        """The part of a loaded model that is stepped; classifier and pooling are dropped."""
        model.reset_classifier(0, "")
        return model

    @staticmethod
    def keep(model: Any, depth: int) -> None:
        """Keep the first blocks of a stripped model."""
        model.blocks = model.blocks[:depth]

    @property
    def sized(self) -> nn.Module:
        return self.model

    @property
    def _position_prefix(self) -> int:
        """Rows of the position table that belong to prefix tokens."""
        return 0 if self.model.no_embed_class else self.num_prefix_tokens

    @staticmethod
    def convert(tensors: Tensors, model: nn.Module) -> Tensors:
        """Official checkpoints of the family -> timm's names."""
        result: Tensors = sys.modules[type(model).__module__].checkpoint_filter_fn(tensors, model)
        return result

    def grid_of(self, size: Size) -> Size:
        h, w = self.model.patch_embed.dynamic_feat_size(size)
        return int(h), int(w)

    def resize(self, size: Size, patch_size: Size) -> None:
        if not self.plain and patch_size != self.patch_size:
            raise MFuserError(
                "patch_size cannot be changed: this model's stem has no single kernel that could "
                f"be resampled; its patches span {self.patch_size[0]} pixels"
            )
        super().resize(size, patch_size)

    def _resize(self, size: Size, patch_size: Size) -> None:
        with warnings.catch_warnings():
            # timm's resampling of bias tables indexes in a way that PyTorch warns about.
            warnings.filterwarnings("ignore", module="timm.layers.interpolate")
            self.model.set_input_size(img_size=size, patch_size=patch_size if self.plain else None)

    def _fill(self, source: Tensors, source_grid: Size) -> None:
        # set_input_size knows one convention only: antialiased bicubic, pseudo-inverse.
        if (table := source.get("pos_embed")) is not None:
            grid = self.grid_of(self.image_size)
            rows = resample_positions(table[0], source_grid, grid, self._position_prefix, self.how)
            self.model.pos_embed.copy_(rows[None])
        if (kernel := source.get("patch_embed.proj.weight")) is not None:
            resampled = resample_kernel(kernel, self.patch_size, self.how)
            self.model.patch_embed.proj.weight.copy_(resampled)

    def _patches(self, images: Tensor) -> Tensor:
        embed = self.model.patch_embed
        if self.plain and not embed.strict_img_size:
            # Only models of one fixed size crop partial patches; the others assert.
            grid = self.grid_of(self.image_size)
            images = images[..., : grid[0] * self.patch_size[0], : grid[1] * self.patch_size[1]]
        return embed(images)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        """The final norm, or the tokens where there is none."""
        # With average pooling the norm moved to fc_norm; a few models have neither.
        model = self.model
        norm: Callable[[Tensor], Tensor] = (
            model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
        )
        return norm(tokens)


class ViTStepper(TimmStepper):
    """VisionTransformer and its distilled form: absolute positions, no state."""

    @staticmethod
    def convert(tensors: Tensors, model: nn.Module) -> Tensors:
        # adapt_layer_scale only renames DeiT-3's gamma_1, which no other family has.
        result: Tensors = vision_transformer.checkpoint_filter_fn(
            tensors, model, adapt_layer_scale=True
        )
        return result

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(self._patches(images)))), None

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens)

    def no_extra(self) -> str | None:
        return unmasked(self.blocks)

    def joint_block(
        self, i: int, tokens: Tensor, state: Any, extra: int, attends: Tensor | None
    ) -> Tensor:
        return self.model.blocks[i](tokens, attn_mask=attends)


class EvaStepper(TimmStepper):
    """EVA, EVA02, DINOv3, Perception Encoder: rotary positions are the state."""

    @staticmethod
    def convert(tensors: Tensors, model: nn.Module) -> Tensors:
        result: Tensors = eva.checkpoint_filter_fn(tensors, model)
        return result

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        # Private, but the only place where timm adds positions before the blocks.
        tokens, rope = self.model._pos_embed(self._patches(images))
        return self.model.norm_pre(tokens), rope

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens, rope=self._rope(i, state))

    def _rope(self, i: int, state: Any) -> Any:
        # Mixed rotary tables are (depth, heads, h·w, d): one per block.
        return state[i] if self.model.rope_mixed and state is not None else state

    def no_extra(self) -> str | None:
        return unmasked(self.blocks)

    def joint_block(
        self, i: int, tokens: Tensor, state: Any, extra: int, attends: Tensor | None
    ) -> Tensor:
        rope = self._rope(i, state)
        if rope is not None:
            # Sines, then cosines of each patch; further tokens are not rotated.
            still = rope.new_zeros(*rope.shape[:-2], extra, rope.shape[-1])
            still[..., rope.shape[-1] // 2 :] = 1
            rope = torch.cat([still, rope], -2)
        return self.model.blocks[i](tokens, rope=rope, attn_mask=attends)


class BeitStepper(TimmStepper):
    """BEiT, BEiT v2: relative-position bias, per block or shared (then it is the state)."""

    _position_prefix = 1

    @staticmethod
    def convert(tensors: Tensors, model: nn.Module) -> Tensors:
        result: Tensors = beit.checkpoint_filter_fn(tensors, model)
        return result

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        model = self.model
        patches = self._patches(images)
        tokens = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        return model.pos_drop(tokens), shared

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens, shared_rel_pos_bias=state)

    def no_extra(self) -> str | None:
        return FIXED_BIAS


class TimmBackbone(Stepped):
    """A timm model as vision backbone.

    After `narrow`, its blocks work in the precision of their weights, and tokens are those of the
    images' between them: what stands there (adapters, taps) works in single precision.
    """

    stepper: TimmStepper
    narrowed = False

    def narrow(self, dtype: torch.dtype) -> None:
        """Hold the parameters in `dtype`; buffers (statistics, rotary periods) stay as they are."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.narrowed = True

    def _inside(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.model.parameters()).dtype) if self.narrowed else tensor

    def embed(self, images: Tensor) -> Stream:
        stream = super().embed(self._inside(images))
        return replace(stream, tokens=stream.tokens.to(images.dtype))

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return super().block(i, self._inside(tokens), state).to(tokens.dtype)

    def block_with(
        self, i: int, tokens: Tensor, state: Any, extra: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = (self._inside(tokens), state, self._inside(extra), visible)
        own, joined = super().block_with(i, *given)
        return own.to(tokens.dtype), joined.to(extra.dtype)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.stepper.finish(self._inside(tokens), state).to(tokens.dtype)
