"""The whole model: images in, class scores out. Reads top to bottom like the paper's figure 2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfuser.config.pairing import PairingSpec
from mfuser.errors import MFuserError
from mfuser.inference import Inference, Network
from mfuser.interfaces import Decoder, DecoderOutput, TextEnhancer
from mfuser.losses import Loss
from mfuser.model.alignment import alignment_loss, score_map
from mfuser.model.criteria import criteria_losses
from mfuser.model.encoder import PairEncoder
from mfuser.model.joining import JoinedBlocks
from mfuser.model.network import TrainedNetwork
from mfuser.model.precision import HALVES, check_lowered, lower
from mfuser.model.sliding_window import Sliding
from mfuser.model.window_batch import WindowBatch
from mfuser.plugins.contracts import expect, scalars

Segmenting = Callable[[Network, Tensor], Tensor]
"""An `Inference`, or a function like one."""


class Prompt(nn.Module):
    """Learned context tokens shared by all classes (CoOp, Zhou et al. 2022): (n, context_dim).

    Trunc-normal with standard deviation 1, as released.
    """

    def __init__(self, length: int, context_dim: int) -> None:
        super().__init__()
        self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(length, context_dim)))


@dataclass
class ModelOutput:
    """alignment: (B, K, h, w) cosine similarity of pixels and class texts; None without a VLM, as
    what follows. text: (K, C). queries: (B, K, C). visual: (B, 1 + T, C). pyramid: four maps."""

    decoder: DecoderOutput
    alignment: Tensor | None
    text: Tensor | None = None
    queries: Tensor | None = None
    visual: Tensor | None = None
    pyramid: list[Tensor] = field(default_factory=list)


class DGSSModel(nn.Module):
    """Two fused encoders, class texts as queries, a mask decoder.

    Images are RGB in [0, 1], or uint8, (B, 3, H, W): each encoder applies its own statistics.
    """

    def __init__(
        self,
        spec: PairingSpec,
        encoder: PairEncoder,
        pyramid: nn.Module | None,
        enhancer: TextEnhancer,
        decoder: Decoder,
        prompt: Prompt | None,
        ids: Tensor | None,
        criteria: Mapping[str, Loss] | None = None,
        before: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = encoder
        self.pyramid = pyramid
        self.enhancer = enhancer
        self.decoder = decoder
        self.prompt = prompt
        self.criteria = nn.ModuleDict(criteria)
        self.before = before
        """The vision-language model before training, where a loss asks for it and it changes."""
        self.register_buffer("ids", ids, persistent=False)
        self.without_ids = "the class names have no token ids"
        """The reason where `ids` is None; `text` raises it."""
        self.record: dict[str, Any] = {}
        """Metadata of a file of this model, beside its tensors: "run", "step", …"""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.spec.classes

    def to(self, *args: Any, **kwargs: Any) -> DGSSModel:
        """As every module's; in half precision the matrices of the encoders alone (`lower`)."""
        kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype | Tensor)]
        dtypes = [kind if isinstance(kind, torch.dtype) else kind.dtype for kind in kinds]
        if not dtypes or dtypes[0] not in HALVES:
            return super().to(*args, **kwargs)
        lower(self, dtypes[0], frozen=False)
        devices = [kind.device for kind in kinds if isinstance(kind, Tensor)]
        others = {name: value for name, value in kwargs.items() if name not in ("dtype", "tensor")}
        places = [*devices, *(a for a in args if not isinstance(a, torch.dtype | Tensor))]
        return super().to(*places, **others) if places or others else self

    def bfloat16(self) -> DGSSModel:
        """`to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def half(self) -> DGSSModel:
        """`to(torch.float16)`."""
        return self.to(torch.float16)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DGSSModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        check_lowered(self)  # what is brought to one precision as a whole computes in it
        return self

    def text(self) -> Tensor:
        """Class text embeddings (K, C), from the prompt, the ids and the text tower as they are."""
        vlm = self.encoder.vlm
        assert vlm is not None
        if self.ids is None:
            raise MFuserError(self.without_ids)
        assert isinstance(self.ids, Tensor)
        text = vlm.within(vlm.encode_text, self.ids, self.prompt.contexts if self.prompt else None)
        return expect(vlm, "encode_text()'s result", text, (len(self.classes), vlm.text_dim))

    def save_pretrained(self, folder: str | os.PathLike[str], *, full: bool = False) -> Path:
        """Write the model into a folder, as `mfuser.save_pretrained` does."""
        from mfuser import save_pretrained  # stands above this module

        return save_pretrained(self, folder, full=full)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, text: Tensor | None = None
    ) -> ModelOutput | dict[str, Tensor]:
        """With labels (B, H, W) int64: named losses, whose sum is minimized. Else predictions.

        text: what `text()` returned, to spare computing it again.
        """
        images = as_unit_range(images)
        output = self.predict(images, text)
        return output if labels is None else self.losses(output, labels, images)

    def predict(self, images: Tensor, text: Tensor | None = None) -> ModelOutput:
        """Images (B, 3, H, W), RGB in [0, 1], of the image size. text: as in `forward`."""
        if self.pyramid is None:
            return self._joining(images, text)
        encoded = self.encoder(images)
        pyramid = self.pyramid(encoded.taps)
        queries = alignment = None
        if encoded.visual is not None:
            text = self.text() if text is None else text
            texts = text.expand(images.shape[0], -1, -1)  # (B, K, C)
            queries = self.enhancer(texts, encoded.visual)
            expect(self.enhancer, "forward()'s result", queries, tuple(texts.shape))
            alignment = score_map(encoded.visual[:, 1:], queries, encoded.grid)
        read = (alignment,) if self.decoder.reads_alignment else ()
        given = self.encoder.queries()
        linked = {} if given is None else {"given": given}
        decoded = self.decoder(pyramid, queries, *read, **linked)
        return ModelOutput(decoded, alignment, text, queries, encoded.visual, pyramid)

    def _joining(self, images: Tensor, text: Tensor | None) -> ModelOutput:
        """A decoder whose tokens join the encoder's last blocks: the texts are its queries as they
        are, since nothing visual is there yet that could enhance them."""
        if text is None and self.encoder.vlm is not None:
            text = self.text()
        queries = None if text is None else text.expand(images.shape[0], -1, -1)  # (B, K, C)
        blocks = JoinedBlocks(self.encoder, images, self.spec.decoder.joins())
        decoded = self.decoder(blocks, queries)
        encoded, alignment = blocks.end(), None
        if queries is not None and encoded.visual is not None:
            alignment = score_map(encoded.visual[:, 1:], queries, encoded.grid)
        return ModelOutput(decoded, alignment, text, queries, encoded.visual)

    def losses(
        self, output: ModelOutput, labels: Tensor, images: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The decoder's losses (eq. 11), the pixel-text alignment (eq. 12), and those of the
        components of the pairing's `losses`, for which the images are needed."""
        losses = scalars(self.decoder, self.decoder.loss(output.decoder, labels))
        options = self.spec.alignment
        if output.alignment is not None and options.weight:
            scale, bias = self._alignment_scale()
            losses["loss_align"] = options.weight * alignment_loss(
                output.alignment, labels, scale, bias, options.loss
            )
        if self.criteria:
            assert images is not None
            losses |= criteria_losses(self, output, labels, images)
        return losses

    def _alignment_scale(self) -> tuple[Tensor | float, Tensor | None]:
        vlm = self.encoder.vlm
        assert vlm is not None
        if vlm.alignment == "sigmoid":
            scale, bias = vlm.logit_scale_bias()
            options = self.spec.alignment
            if options.logit_scale is not None:
                scale = torch.full_like(scale, options.logit_scale).exp()
            if options.logit_bias is not None:
                bias = torch.full_like(scale, options.logit_bias)
            return scale, bias
        return 1 / self.spec.alignment.temperature, None

    def segment(
        self,
        images: Tensor,
        *,
        stride: int | tuple[int, int] | None = None,
        window_batch: WindowBatch = 1,
        text: Tensor | None = None,
    ) -> Tensor:
        """Class scores (B, K, H, W) of images of any size from the image size up.

        Larger images are read through a sliding window of the image size, whose scores are
        averaged, in float32 at least. The class texts are computed once per call, never kept: a
        change of the prompt, the ids or the text tower, however made, shows in the next call.

        stride: of the window in pixels, one number or (height, width); None: two thirds of the
            window, as released.
        window_batch: windows that go through the model at once; "auto": as many as a GPU has memory
            for; elsewhere one, or a few small ones.
        text: what `text()` returned, for calls in a row between which nothing changes it.

        Raises MFuserError for smaller images and for a stride or window_batch that makes no sense.
        """
        return self.segment_by(Sliding(stride, window_batch), images, text=text)

    def segment_by(
        self, inference: Segmenting, images: Tensor, *, text: Tensor | None = None
    ) -> Tensor:
        """Class scores (B, K, H, W) of images as `segment` takes them, by another inference.

        Raises what the inference raises, and PluginError for scores of another shape.
        """
        images = batched(images)
        with evaluating(self):
            if text is None and self.encoder.vlm is not None:
                text = self.text()
            network = TrainedNetwork(self, text)
            if isinstance(inference, Inference):
                inference.check(network, (images.shape[-2], images.shape[-1]))
            scores = inference(network, images)
        shape = (len(images), len(self.classes), *images.shape[-2:])
        return expect(inference, "the result for images", scores, shape)

    def scores(self, windows: Tensor, text: Tensor | None = None) -> Tensor:
        """Class scores (B, K, H, W) of windows (B, 3, H, W) of the image size."""
        output = self(windows, text=text)
        size = (windows.shape[-2], windows.shape[-1])
        device = windows.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # In half precision near scores would become equal.
            with torch.autocast(device, enabled=False):
                scores = self.decoder.semantic_logits(output.decoder, size)
        else:
            scores = self.decoder.semantic_logits(output.decoder, size)
        shape = (windows.shape[0], len(self.classes), *size)
        return expect(self.decoder, "semantic_logits()'s result", scores, shape)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every part is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:  # part by part: a norm that the caller froze stays so
        for module, training in modes.items():
            module.training = training


def batched(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) or (3, H, W), uint8 or float -> (B, 3, H, W) float in [0, 1]."""
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3:
        raise MFuserError(f"images have shape {tuple(images.shape)}, not (B, 3, H, W) or (3, H, W)")
    return as_unit_range(images)


def as_unit_range(images: Tensor) -> Tensor:
    """uint8 or float images -> float in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise MFuserError(f"images are {images.dtype}; give uint8 (0 to 255) or float in [0, 1]")
    return images
