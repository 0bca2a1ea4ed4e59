"""Products in half precision within a part of a model, and tensors in single around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def multiplying(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Autocast, without its trap on CPUs (`_Contiguous`)."""
    trap = _Contiguous() if device == "cpu" else contextlib.nullcontext()
    with torch.autocast(device, dtype), trap:
        yield


def single(value: Any) -> Any:
    """A tensor or a tuple of tensors, those of half precision in float32; anything else, which
    others refuse, as it is."""
    if isinstance(value, tuple):
        return tuple(map(single, value))
    lowered = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if lowered else value


class _Contiguous(TorchFunctionMode):
    """Hands torch's own attention contiguous inputs.

    Its module transposes a batch of two and more; for a frozen weight torch then multiplies row by
    row of the sequence, and in half precision copies the weight for each of them: a block of CLIP
    ViT-B took six times as long as in float32, and a step of dinov2-s_clip-b twice the memory.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.multi_head_attention_forward:
            # One tensor in place of one: attention of a sequence to itself goes by identity.
            copies = {id(given): given.contiguous() for given in args[:3]}
            args = (*(copies[id(given)] for given in args[:3]), *args[3:])
        return func(*args, **(kwargs or {}))
