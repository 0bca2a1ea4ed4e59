"""Memory that ran out: what took it, and what to lower, in the order that hurts least."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mfuser.config.recipe import RecipeSpec
from mfuser.errors import OutOfMemoryError, out_of_memory
from mfuser.inference import Inference
from mfuser.model.dgss import DGSSModel

with contextlib.suppress(ImportError):  # not on Windows
    import resource

LARGE = 0.25
"""The share of the memory in use from which the frozen weights are worth shrinking."""


def of_training(model: DGSSModel, recipe: RecipeSpec, step: int, device: torch.device) -> str:
    """A sentence. step: the one that failed, counted from 0."""
    frozen = _bytes(t for t in model.parameters() if not t.requires_grad)
    single = (t for t in model.parameters() if t.dtype == torch.float32)
    whole = _bytes(t for t in single if not t.requires_grad)
    trained = _bytes(t for t in model.parameters() if t.requires_grad)
    sets = 4 + (recipe.ema is not None)  # with their gradients and AdamW's two moments
    used = peak(device)
    rest = max(0, used - frozen - sets * trained)
    height, width = model.spec.image_size
    return (
        f"out of memory in step {step + 1} on {where(device)}, {recipe.batch_size} crops of "
        f"{width}x{height} at a time: at the peak, frozen weights held {_gb(frozen)}, trained ones "
        f"with gradients and optimizer {_gb(sets * trained)}, all else (activations most of all) "
        f"{_gb(rest)}; lower, what hurts least first: "
        + "; ".join(_of_recipe(recipe, model, whole > LARGE * used))
    )


def _of_recipe(recipe: RecipeSpec, model: DGSSModel, heavy: bool) -> list[str]:
    """heavy: frozen weights in float32 are much of it."""
    found = []
    if recipe.checkpointing is not True:
        found.append("--set-recipe checkpointing=true (the same weights, a third more time)")
    batch = recipe.batch_size
    if batch > 1:
        part = max(n for n in range(1, batch) if batch % n == 0)
        split = f"batch_size={part} --set-recipe accumulate={recipe.accumulate * batch // part}"
        found.append(f"--set-recipe {split} (as many crops a step)")
    if heavy:
        found.append("--set-recipe frozen_dtype=bfloat16 (half the frozen weights)")
    if recipe.precision == "no":
        half = "--set-recipe precision=bf16 (half the activations, slightly other weights)"
        found.append(half)
    found.append(f"--set image_size={min(model.spec.image_size) * 3 // 4 // 32 * 32 or 32}")
    found.append("smaller encoders (mfuser list backbones)")
    return found


def of_inference(inference: Inference, size: tuple[int, int], classes: int, options: str) -> str:
    """A sentence. size: (height, width) of the image. options: what the command takes, the least
    harmful first."""
    windows = int(getattr(inference, "window_batch", 1))
    lower = [f"--set inference.window_batch=1 (now {windows})"] if windows > 1 else []
    scores = 4 * classes * size[0] * size[1]
    return (
        f"out of memory: an image of {size[1]}x{size[0]}, whose scores for {classes} classes take "
        f"{_gb(scores)} more than once; lower, what hurts least first: "
        + "; ".join([*lower, options])
    )


@contextlib.contextmanager
def explained(
    inference: Inference, size: tuple[int, int], classes: int, options: str
) -> Iterator[None]:
    """Memory that runs out within is an OutOfMemoryError that says so (see `of_inference`)."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(of_inference(inference, size, classes, options)) from error


@contextlib.contextmanager
def undone(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[Callable[[BaseException], bool]]:
    """Yields what makes of a step within, which an error has ended, none: the weights, the running
    statistics of norms and the optimizer are those before it, and what the error held is free.
    It returns False where the optimizer had begun to change them.
    """
    begun: list[bool] = []
    hook = optimizer.register_step_pre_hook(lambda *_: begun.append(True))
    statistics = {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }

    def undo(error: BaseException) -> bool:
        traceback.clear_frames(error.__traceback__)
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        model.load_state_dict(statistics, strict=False)
        return not begun

    try:
        yield undo
    finally:
        hook.remove()


def peak(device: torch.device) -> int:
    """Bytes that were in use at most: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, else KiB
        return unit * int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    except NameError:
        return 0


def where(device: torch.device) -> str:
    """ "NVIDIA H100 (80 GB)", "the CPU", or "mps"."""
    if device.type != "cuda":
        return "the CPU" if device.type == "cpu" else device.type
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.name} ({found.total_memory / 1e9:.0f} GB)"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
