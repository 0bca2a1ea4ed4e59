"""Vision transformers of transformers: one stepper, a table row per model type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfuser import MFuserError
from mfuser_plugins.backbones._resample import Resampling, resample_kernel
from mfuser_plugins.backbones._stepping import FIXED_BIAS, Size, Stepped, Stepper


@dataclass(frozen=True)
class Layout:
    """Where a model type keeps its parts. Names differ between types and between versions.

    prefix: tokens before the patches, not counting registers. pre_norm: a norm after `embeddings`.
    interpolate: whether `embeddings` must be told to resample positions. rope: whether the layers
    take rotary positions.
    """

    layers: str
    norm: str
    kernel: str
    prefix: int
    registers: bool = False
    pre_norm: str | None = None
    interpolate: bool = False
    rope: bool = False


PROJECTION = "embeddings.patch_embeddings.projection"
LAYOUTS = {
    "dinov2": Layout("encoder.layer", "layernorm", PROJECTION, 1),
    "dinov2_with_registers": Layout(
        "encoder.layer", "layernorm", PROJECTION, 1, registers=True
    ),
    "dinov3_vit": Layout(
        "model.layer", "norm", "embeddings.patch_embeddings",
        1, registers=True, rope=True,
    ),
    "vit": Layout("layers", "layernorm", PROJECTION, 1, interpolate=True),
    "vit_msn": Layout("layers", "layernorm", PROJECTION, 1, interpolate=True),
    "deit": Layout("layers", "layernorm", PROJECTION, 2, interpolate=True),
    "ijepa": Layout("layers", "layernorm", PROJECTION, 0, interpolate=True),
    "clip_vision_model": Layout(
        "encoder.layers", "post_layernorm", "embeddings.patch_embedding", 1,
        pre_norm="pre_layrnorm", interpolate=True,
    ),
    "metaclip_2_vision_model": Layout(
        "encoder.layers", "post_layernorm", "embeddings.patch_embedding", 1,
        pre_norm="pre_layrnorm", interpolate=True,
    ),
    "vit_mae": Layout("layers", "layernorm", PROJECTION, 1, interpolate=True),
    "beit": Layout("layers", "layernorm", PROJECTION, 1),
    "data2vec-vision": Layout("encoder.layer", "layernorm", PROJECTION, 1),
    "siglip2_vision_model": Layout(
        "encoder.layers", "post_layernorm", "embeddings.patch_embedding", 0
    ),
    "aimv2_vision_model": Layout("encoder.layers", "rms_norm", "embeddings.patch_embed", 0),
    "siglip_vision_model": Layout(
        "encoder.layers", "post_layernorm", "embeddings.patch_embedding", 0,
        interpolate=True,
    ),
}  # fmt: skip


class HuggingFaceStepper(Stepper):
    """Steps a vision model of transformers, whose own code resamples positions in `embeddings`."""

    def __init__(self, model: Any, how: Resampling) -> None:
        config = model.config
        layout = LAYOUTS.get(config.model_type)
        if layout is None:
            raise MFuserError(
                f"transformers model type '{config.model_type}' ({type(model).__name__}) cannot be "
                f"stepped here; the types that can: {', '.join(LAYOUTS)}, and clip, siglip, "
                "siglip2, metaclip_2, aimv2"
            )
        self.model, self.how, self.layout = model, how, layout
        try:
            self.layers: Any = model.get_submodule(layout.layers)
            self.norm: Any = model.get_submodule(layout.norm)
            kernel: Any = model.get_submodule(layout.kernel)
        except AttributeError as error:
            import transformers

            raise MFuserError(
                f"transformers {transformers.__version__} keeps the parts of '{config.model_type}' "
                f"elsewhere than the versions known here ({error}): "
                "pip install 'transformers>=5.23,<6'"
            ) from error
        self.embed_dim = int(config.hidden_size)
        self.depth = len(self.layers)
        registers = config.num_register_tokens if layout.registers else 0
        self.num_prefix_tokens = layout.prefix + registers
        super().__init__(*self._sizes(kernel), self._tables_of(kernel))

    def _sizes(self, kernel: Any) -> tuple[Size, Size]:
        """Image and patch size of the configuration."""
        size = self.model.config.image_size
        square = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        return square, tuple(kernel.kernel_size)

    def _tables_of(self, kernel: Any) -> list[str]:
        return [f"{self.layout.kernel}.weight"]

    @property
    def sized(self) -> nn.Module:
        return self.model

    @property
    def blocks(self) -> Any:
        return self.layers

    def grid_of(self, size: Size) -> Size:
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        model, layout = self.model, self.layout
        options = {"interpolate_pos_encoding": True} if layout.interpolate else {}
        tokens = model.embeddings(images, **options)
        if layout.pre_norm is not None:
            tokens = model.get_submodule(layout.pre_norm)(tokens)
        return tokens, model.rope_embeddings(images) if layout.rope else None

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        options = {"position_embeddings": state} if self.layout.rope else {}
        return self.layers[i](tokens, attention_mask=None, **options)

    def no_extra(self) -> str | None:
        return None

    def joint_block(
        self, i: int, tokens: Tensor, state: Any, extra: int, attends: Tensor | None
    ) -> Tensor:
        # Rotary positions are of the last tokens, the patches.
        options = {"position_embeddings": state} if self.layout.rope else {}
        mask = attends
        # The only place where transformers says which attention was chosen.
        if attends is not None and self.model.config._attn_implementation != "sdpa":
            lowest = torch.finfo(tokens.dtype).min
            mask = torch.zeros_like(attends, dtype=tokens.dtype).masked_fill(~attends, lowest)
        return self.layers[i](tokens, attention_mask=mask, **options)

    def _resize(self, size: Size, patch_size: Size) -> None:
        kernel: Any = self.model.get_submodule(self.layout.kernel)
        if patch_size == tuple(kernel.kernel_size):
            return
        weight = kernel.weight
        kernel.kernel_size = kernel.stride = patch_size
        kernel.weight = nn.Parameter(
            weight.new_empty(*weight.shape[:2], *patch_size), requires_grad=weight.requires_grad
        )
        for holder in (self.model.config, *self.model.embeddings.modules()):
            if "patch_size" in vars(holder):
                both = isinstance(holder.patch_size, tuple | list)
                holder.patch_size = patch_size if both else patch_size[0]

    def _fill(self, source: dict[str, Tensor], source_grid: Size) -> None:
        kernel: Any = self.model.get_submodule(self.layout.kernel)
        (weight,) = source.values()
        kernel.weight.copy_(resample_kernel(weight, self.patch_size, self.how))


class MaeStepper(HuggingFaceStepper):
    """ViT-MAE, which shuffles and drops patches, in evaluation too, unless told not to."""

    def __init__(self, model: Any, how: Resampling) -> None:
        model.config.mask_ratio = 0.0
        super().__init__(model, how)

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        h, w = self.grid_of((int(images.shape[-2]), int(images.shape[-1])))
        # Patches are put into the order of the noise.
        order = torch.arange(h * w, device=images.device, dtype=torch.float32)
        noise = order.expand(images.shape[0], -1)
        embeddings = self.model.embeddings
        return embeddings(images, noise=noise, interpolate_pos_encoding=True)[0], None


class HuggingFaceBeitStepper(HuggingFaceStepper):
    """BEiT: the layers interpolate their bias to the image's size; a shared one is the state."""

    def grid_of(self, size: Size) -> Size:
        self._whole(size)
        return super().grid_of(size)

    def _whole(self, size: Size) -> None:
        # Its bias would be of another grid than its tokens.
        if size[0] % self.patch_size[0] or size[1] % self.patch_size[1]:
            raise MFuserError(
                f"{type(self.model).__name__} takes images of whole patches, multiples of "
                f"{self.patch_size[0]} pixels; {size[0]}x{size[1]} is not"
            )

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        tokens = self._tokens(images)
        bias = self._shared_bias()
        if bias is not None:
            bias = bias(
                self.grid_of(self.image_size),
                interpolate_pos_encoding=True,
                dim_size=tokens.shape[1],
            )
        return tokens, (images.shape[2:], bias)

    def no_extra(self) -> str | None:
        return FIXED_BIAS

    def _tokens(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model.embeddings(images)
        return tokens

    def _shared_bias(self) -> Any:
        """The module that makes the bias of all layers; None where each has its own."""
        return self.model.shared_position_bias

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        size, bias = state
        return self.layers[i](
            tokens, attention_mask=bias, interpolate_pos_encoding=True, resolution=size
        )


class Data2VecStepper(HuggingFaceBeitStepper):
    """data2vec-vision: as BEiT; embeddings and layers return tuples."""

    def _tokens(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model.embeddings(images)[0]
        return tokens

    def _shared_bias(self) -> Any:
        encoder = self.model.encoder
        return encoder.relative_position_bias if encoder.has_relative_position_bias else None

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        size, bias = state
        return self.layers[i](
            tokens, relative_position_bias=bias, interpolate_pos_encoding=True, resolution=size
        )[0]


class Siglip2Stepper(HuggingFaceStepper):
    """SigLIP 2: takes flattened patches, channel last within a patch; any size as it is."""

    def _sizes(self, kernel: Any) -> tuple[Size, Size]:
        patch = int(self.model.config.patch_size)
        side = math.isqrt(self.model.config.num_patches) * patch
        return (side, side), (patch, patch)

    def _tables_of(self, kernel: Any) -> list[str]:
        return []

    def flatten(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> patches (B, h·w, p·p·3), grids (B, 2)."""
        (h, w), p = self.grid_of(self.image_size), self.patch_size[0]
        patches = images[..., : h * p, : w * p].unflatten(3, (w, p)).unflatten(2, (h, p))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return patches, torch.tensor([[h, w]] * len(images))

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        return self.model.embeddings(*self.flatten(images)), None

    def _resize(self, size: Size, patch_size: Size) -> None:
        if patch_size != self.patch_size:
            raise MFuserError("SigLIP 2 takes flattened patches; their size cannot be changed")

    def _fill(self, source: dict[str, Tensor], source_grid: Size) -> None:
        pass


class Aimv2Stepper(HuggingFaceStepper):
    """AIMv2: any size where positions are sines (`is_native`), else the size it was made for."""

    def _resize(self, size: Size, patch_size: Size) -> None:
        own, _ = self._sizes(self.model.get_submodule(self.layout.kernel))
        if not self.model.config.is_native and (size != own or patch_size != self.patch_size):
            raise MFuserError(
                f"this AIMv2 model has positions for images of {own[0]}x{own[1]} only; use that "
                "image_size, or a model with is_native = true"
            )
        super()._resize(size, patch_size)


STEPPERS: dict[str, type[HuggingFaceStepper]] = {
    "vit_mae": MaeStepper,
    "beit": HuggingFaceBeitStepper,
    "data2vec-vision": Data2VecStepper,
    "siglip2_vision_model": Siglip2Stepper,
    "aimv2_vision_model": Aimv2Stepper,
}


def stepper(model: Any, how: Resampling) -> HuggingFaceStepper:
    """The stepper of a model's type. Raises MFuserError for types that have none."""
    return STEPPERS.get(model.config.model_type, HuggingFaceStepper)(model, how)


class HuggingFaceBackbone(Stepped):
    """A vision model of transformers."""

    stepper: HuggingFaceStepper

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.stepper.norm(tokens)
