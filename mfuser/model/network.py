"""The trained model as an inference sees it: at the window's size as it is, at others resized."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mfuser.errors import MFuserError
from mfuser.inference import Network
from mfuser.interfaces import VisionBackbone

if TYPE_CHECKING:
    from mfuser.model.dgss import DGSSModel

Size = tuple[int, int]

SHARED = (nn.Linear, nn.MultiheadAttention)
"""Modules that no backbone resamples for another image size; they hold nearly all parameters."""


class TrainedNetwork(Network):
    """text: what `DGSSModel.text()` returned; None where there is no text, or only sizes count.

    Images of another size than the window's go through a copy of the model whose backbones are
    resized. It shares the weights, and lasts until a size differs from the one before; the model
    itself is never changed, so that it can be in the middle of its training.
    """

    def __init__(self, model: DGSSModel, text: Tensor | None = None) -> None:
        self.model, self.text = model, text
        self.window = model.spec.image_size
        patches = [b.patch_size for b in model.encoder.backbones.values()]
        self.patch = (math.lcm(*(p[0] for p in patches)), math.lcm(*(p[1] for p in patches)))
        self._resized: tuple[Size, DGSSModel] | None = None

    def scores(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        if not len(images):
            # An empty batch has empty scores; backbones cannot reshape it.
            shape = (0, len(self.model.classes), *size)
            dtype = next(self.model.parameters()).dtype
            return images.new_empty(shape, dtype=torch.promote_types(dtype, torch.float32))
        if size == self.window:
            return self.model.scores(images, self.text)
        if self._resized is None or self._resized[0] != size:
            self._resized = None  # before the next one takes its memory
            self._resized = size, resized(self.model, size)
        try:
            return self._resized[1].scores(images, self.text)
        except (MFuserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "allocate memory" in str(error):
                raise
            raise MFuserError(
                f"a part of the model works at the size of its window alone ({self.window[0]}x"
                f"{self.window[1]}), and was given an image of {size[0]}x{size[1]} "
                f'({type(error).__name__}: {error}); use inference = "sliding"'
            ) from error

    def confidence(self, scores: Tensor) -> Tensor:
        if self.model.decoder.scores == "shares":
            return scores.amax(1) / scores.sum(1).clamp_min(1e-12)
        return (scores.amax(1) - scores.logsumexp(1)).exp()


def resized(model: DGSSModel, size: Size) -> DGSSModel:
    """A copy of the model for images of `size`, of which only the backbones are copies, without
    their large weights. Raises MFuserError where a backbone refuses the size."""
    shared: list[object] = [model.spec, *_beside_backbones(model)]
    for backbone in model.encoder.backbones.values():
        for module in backbone.modules():
            shared += module.parameters() if isinstance(module, SHARED) else ()
    copied = copy.deepcopy(model, {id(part): part for part in shared})
    copied.encoder.resize(size)
    return copied


def _beside_backbones(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules below this one that hold no backbone."""
    for child in module.children():
        if isinstance(child, VisionBackbone):
            continue
        if any(isinstance(part, VisionBackbone) for part in child.modules()):
            yield from _beside_backbones(child)
        else:
            yield child
