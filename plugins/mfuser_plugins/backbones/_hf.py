"""Vision transformers of transformers: one stepper, a table row per model type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mfuser import MFuserError
from mfuser_plugins.backbones._resample import Resampling, resample_kernel
from mfuser_plugins.backbones._stepping import Size, Stepped, Stepper


@dataclass(frozen=True)
class Layout:
    """Where a model type keeps its parts. Names differ between types and between versions.

    prefix: tokens before the patches, registers aside. pre_norm: a norm after `embeddings`.
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
                f"stepped here; the types that can: {', '.join(LAYOUTS)}, and clip, siglip"
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
        size = config.image_size
        super().__init__(
            (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            tuple(kernel.kernel_size),
            [f"{layout.kernel}.weight"],
        )

    @property
    def sized(self) -> nn.Module:
        return self.model

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


class HuggingFaceBackbone(Stepped):
    """A vision model of transformers."""

    stepper: HuggingFaceStepper

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.stepper.norm(tokens)
