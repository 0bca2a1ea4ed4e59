"""timm's further transformers of one width and one grid: relative positions, SAM, NaFlex, CaiT,
XCiT, and the image encoders of Qwen3-VL, DeepSeek and Gemma 4."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from mfuser_plugins.backbones._resample import resample_kernel, resample_positions
from mfuser_plugins.backbones._stepping import FIXED_BIAS, Size
from mfuser_plugins.backbones._timm import Tensors, TimmStepper


class RelPosStepper(TimmStepper):
    """VisionTransformerRelPos: no absolute positions; a shared bias is the state."""

    has_table = False

    def no_extra(self) -> str | None:
        return FIXED_BIAS

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        model = self.model
        tokens = self._patches(images)
        if model.cls_token is not None:
            tokens = torch.cat([model.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens, None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias()

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens, shared_rel_pos=state)


class HandSizedStepper(TimmStepper):
    """Classes with a position table and no `set_input_size`, whose blocks see patches only."""

    any_prefix = False
    _position_prefix = 0

    def _resize(self, size: Size, patch_size: Size) -> None:
        model = self.model
        model.patch_embed.set_input_size(img_size=size, patch_size=patch_size)
        table = model.pos_embed
        if table is None:
            return
        shape = self._table_shape(*self.grid_of(size))
        if table.shape[1:-1] != shape:
            model.pos_embed = nn.Parameter(
                table.new_empty(1, *shape, table.shape[-1]), requires_grad=table.requires_grad
            )

    def _table_shape(self, h: int, w: int) -> tuple[int, ...]:
        return (h * w,)

    def _fill(self, source: Tensors, source_grid: Size) -> None:
        if (table := source.get("pos_embed")) is not None:
            grid = self.grid_of(self.image_size)
            rows = table.reshape(-1, table.shape[-1])
            resampled = resample_positions(rows, source_grid, grid, 0, self.how)
            self.model.pos_embed.copy_(resampled.view(self.model.pos_embed.shape))
        kernel = source["patch_embed.proj.weight"]
        self.model.patch_embed.proj.weight.copy_(resample_kernel(kernel, self.patch_size, self.how))


class CaitStepper(HandSizedStepper):
    """CaiT. The class token joins behind the last block, through class attention of its own, which
    leaves the patches as they are; it is left out."""

    @staticmethod
    def strip(model: Any) -> Any:
        model.blocks_token_only = model.cls_token = None
        return TimmStepper.strip(model)

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        model = self.model
        return model.pos_drop(self._patches(images) + model.pos_embed), None

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.model.norm(tokens)


class SamStepper(HandSizedStepper):
    """SAM's image encoder: maps instead of sequences inside the blocks; the grid is the state. Its
    convolutional neck, of another width, is left out."""

    @staticmethod
    def strip(model: Any) -> Any:
        model.neck = model.head = nn.Identity()
        return model

    def _table_shape(self, h: int, w: int) -> tuple[int, ...]:
        return (h, w)

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        model = self.model
        maps = self._patches(images)  # (B, h, w, D)
        if model.pos_embed is not None:
            maps = maps + model.pos_embed
        maps = model.norm_pre(model.patch_drop(model.pos_drop(maps)))
        return maps.flatten(1, 2), tuple(maps.shape[1:3])

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens.unflatten(1, state)).flatten(1, 2)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return tokens


class AnySizeStepper(TimmStepper):
    """Classes that take any size as they are and resample positions by themselves, in the
    convention of their publication."""

    has_table = False

    def _default_size(self) -> tuple[Size, Size]:
        h, w = self._patch()
        return (14 * h, 14 * w), (h, w)

    def _patch(self) -> Size:
        h, w = self._stem.patch_size
        return int(h), int(w)

    def grid_of(self, size: Size) -> Size:
        h, w = self._patch()
        return size[0] // h, size[1] // w

    def _cut(self, images: Tensor) -> Tensor:
        """Without partial patches."""
        (h, w), (p, q) = self.grid_of(self.image_size), self._patch()
        return images[..., : h * p, : w * q]

    def _resize(self, size: Size, patch_size: Size) -> None:
        if self.plain:
            self._stem.set_input_size(img_size=size, patch_size=patch_size)


class NaFlexStepper(AnySizeStepper):
    """NaFlexVit: rotary positions (one table per block where mixed) and mask are the state."""

    @property
    def _stem(self) -> Any:
        return self.model.embeds

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        # Private, but the only place where timm adds positions before the blocks.
        found = self.model._forward_embeds(self._cut(images), None, None, None)
        rope = found["rope_embeds"]
        if self.model.rope_is_mixed and rope is not None:
            rope = list(rope)
        return found["patches"], (rope, found["attn_mask"])

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        rope, mask = state
        block = self.model.blocks[i]
        if rope is None:
            return block(tokens, attn_mask=mask)
        return block(tokens, rope=rope[i] if self.model.rope_is_mixed else rope, attn_mask=mask)


class XcitStepper(AnySizeStepper):
    """XCiT: every block takes the grid. The class token joins behind the last block, through class
    attention of its own, which is left out."""

    any_prefix = False

    @staticmethod
    def strip(model: Any) -> Any:
        model.cls_attn_blocks = model.cls_token = None
        return TimmStepper.strip(model)

    def _patch(self) -> Size:
        return self._stem.patch_size, self._stem.patch_size

    def grid_of(self, size: Size) -> Size:
        # Convolutions of stride 2 with padding: a partial patch counts as one.
        patch, _ = self._patch()
        return -(-size[0] // patch), -(-size[1] // patch)

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        model = self.model
        tokens, grid = model.patch_embed(images)
        if model.pos_embed is not None:
            positions = model.pos_embed(tokens.shape[0], *grid)  # (B, D, h, w)
            tokens = tokens + positions.flatten(2).transpose(1, 2)
        return model.pos_drop(tokens), grid

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens, *state)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.model.norm(tokens)


class EncoderStepper(AnySizeStepper):
    """Image encoders of language models, alone or inside a timm classifier, which is removed
    along with the projector."""

    projector = ""

    @classmethod
    def convert(cls, tensors: Tensors, model: nn.Module) -> Tensors:
        kind = "classifier" if _is_classifier(model) else "encoder"
        convert = vars(sys.modules[type(model).__module__])[f"checkpoint_filter_fn_{kind}"]
        result: Tensors = convert(tensors, model)
        return result

    @classmethod
    def strip(cls, model: Any) -> Any:
        encoder = model.encoder if _is_classifier(model) else model
        setattr(encoder, cls.projector, None)
        encoder.global_pool = ""
        return encoder

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return tokens


def _is_classifier(model: nn.Module) -> bool:
    return type(model).__name__.endswith("Classifier")


class QwenStepper(EncoderStepper):
    """The encoder of Qwen3-VL: rotary positions are the state, no final norm."""

    projector = "merger"

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        # Private, as above.
        tokens, rope = self.model._pos_embed(self.model.patch_embed(self._cut(images)))
        return tokens, rope

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens, rope=state)


class DeepseekStepper(QwenStepper):
    """The encoder of DeepSeek V4: as Qwen's, with a final norm."""

    projector = "aligner"

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.model.norm(tokens)


class GemmaStepper(EncoderStepper):
    """The encoder of Gemma 4: rotary cosines and sines are the state, no final norm."""

    projector = "pooler"

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        # No padding where the images fill the grid.
        tokens, positions, _ = self.model.patch_embed(self._cut(images))
        return tokens, self.model.rotary_emb(tokens, positions)

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.model.blocks[i](tokens, *state, attn_mask=None)
