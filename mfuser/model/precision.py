"""Half precision of a model: the matrices of its encoders, and nothing that is small or exact.

    linear maps, embeddings, attention, convolutions    half: 99.6 % of an encoder
    what reads the image (patch kernel, stem)           single
    norms, biases, positions, statistics, rotary tables single
    what a tuning adds (low-rank updates, tokens)       single
    adapters, prompt, pyramid, enhancer, decoder        single

The matrices are multiplied in their precision (autocast), and what is added up between them, the
stream of tokens, stays in single: so adapters and decoder are given what they always are. Of all
that could be rounded the image costs most: reading it in bfloat16 turned over three times as many
pixels of the demo as all the rest (docs/scale.md). `VisionBackbone.within` is where it happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # the only name for all of them
from torch.nn.utils import parametrize

from mfuser.interfaces import VisionBackbone

if TYPE_CHECKING:
    from mfuser.model.dgss import DGSSModel

HALVES = (torch.bfloat16, torch.float16)
LAYERS = (nn.Linear, nn.Embedding, nn.MultiheadAttention, _ConvNd)
"""The modules that hold an encoder's matrices."""


def lower(model: DGSSModel, dtype: torch.dtype, *, frozen: bool = True) -> None:
    """Hold the matrices of the encoders in half precision, in place, and multiply in it.

    frozen: those alone that do not train; else all of them, for inference. Encoders that an option
    of their own holds in half precision stay as they are.
    """
    for tower in towers(model):
        if tower.lowered is None and any(p.dtype in HALVES for p in tower.parameters()):
            continue
        names = {id(p): name for name, p in tower.named_parameters()}
        exact = dict(getattr(tower, "exact", {}))
        chosen = list(matrices(tower, frozen))
        for weight in chosen:
            if weight.dtype not in HALVES and not weight.is_meta:
                exact[names[id(weight)]] = sampled(weight)
            weight.data = weight.data.to(dtype)
        tower.exact, tower.lowered = exact, dtype if chosen else None


def check_lowered(model: DGSSModel) -> None:
    """Forget what was lowered where all weights of an encoder have come to one precision again."""
    for tower in towers(model):
        if tower.lowered is not None and len({p.dtype for p in tower.parameters()}) == 1:
            tower.lowered = None


def towers(model: DGSSModel) -> list[VisionBackbone]:
    """The encoders, and the vision-language model before training where a loss asks for it."""
    before = getattr(model.before, "vlm", None)
    return [*model.encoder.backbones.values(), *([before] if before is not None else [])]


def matrices(tower: VisionBackbone, frozen: bool = True) -> Iterator[nn.Parameter]:
    """The weights of an encoder that can be lowered; frozen: those alone that do not train.

    Not among them: what reads the image, and what a tuning adds.
    """
    stem = _stem(tower)
    for name, layer in tower.named_modules():
        if not isinstance(layer, LAYERS) or layer in stem or name.split(".")[0] == "refiner":
            continue
        found = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
        if parametrize.is_parametrized(layer):
            updated = layer.parametrizations.values()  # type: ignore[operator]
            found += [made.original for made in updated if made.original.dim() > 1]
        yield from (p for p in found if p.is_floating_point() and not (frozen and p.requires_grad))


def _stem(tower: VisionBackbone) -> set[nn.Module]:
    """The modules that run before the first block, looked at while they read an empty image."""
    called: set[nn.Module] = set()

    def look(module: nn.Module, given: object) -> None:
        called.add(module)
        if isinstance(module, nn.MultiheadAttention):  # reads its last map's weight itself
            called.update(module.modules())

    handles = [m.register_forward_pre_hook(look) for m in tower.modules() if m is not tower]
    images = torch.zeros(1, 3, *tower.image_size, device=next(tower.parameters()).device)
    try:
        with torch.no_grad():
            tower.embed(tower.normalize(images))
    except (NotImplementedError, RuntimeError):
        if not images.is_meta:  # some are not laid out without values
            raise
    finally:
        for handle in handles:
            handle.remove()
    return called


def frozen_bytes(model: DGSSModel, dtype: torch.dtype | None = None) -> int:
    """Memory of the encoders' frozen weights as they are, or lowered to `dtype`."""
    total = 0
    for tower in towers(model):
        halved = {id(p) for p in matrices(tower)} if dtype is not None else set()
        for p in tower.parameters():
            if not p.requires_grad:
                size = p.element_size()
                if id(p) in halved and dtype is not None:
                    size = min(size, dtype.itemsize)
                total += p.numel() * size
    return total


def sampled(parameter: Tensor) -> list[float]:
    """Two values of a tensor: they tell it from another."""
    flat = parameter.detach().flatten()
    # Taken first and widened on the CPU: Apple's GPUs have no double precision.
    return flat[[len(flat) // 3, 2 * len(flat) // 3]].cpu().double().tolist()
