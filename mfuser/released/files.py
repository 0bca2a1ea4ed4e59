"""Reading a released checkpoint: tensors and metadata, nothing executed, nothing copied."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfuser.errors import CheckpointError


@dataclass(frozen=True)
class Released:
    """state: tensors by released name, mapped from the file. classes: as its metadata names them.
    step: iterations trained. Both None where the file does not say."""

    state: dict[str, Tensor]
    classes: tuple[str, ...] | None
    step: int | None


def read_released(path: Path) -> Released:
    """A .pth of mmsegmentation ({state_dict, meta}), a bare state dict, or .safetensors.

    Raises CheckpointError if the file is missing, cut off, no checkpoint, or wants to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        content = _load(path)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {_why(path, error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a table with a state_dict"
        )
    state = content.get("state_dict", content)
    tensors = (
        {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
        if isinstance(state, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors by name ({', '.join(map(str, list(content)[:5]))}); a "
            "released checkpoint keeps them under state_dict"
        )
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    classes, step = meta.get("CLASSES"), meta.get("iter")
    return Released(
        tensors,
        tuple(map(str, classes)) if isinstance(classes, list | tuple) else None,
        step if isinstance(step, int) else None,
    )


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # mmsegmentation keeps its command line and scores (numpy scalars) beside the weights.
    scalar = np.float64(0).__reduce__()[0]
    plain: list[Any] = [argparse.Namespace, np.dtype, scalar]
    # The module's name before and since NumPy 2.
    plain += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    plain += [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    with torch.serialization.safe_globals(plain):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)


def _why(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError) and "unsupported global" in text.lower():
        return (
            f"it holds more than tensors and plain values, and nothing in it is executed "
            f"({_named(text)}); save its state_dict alone where you trust the file"
        )
    return (
        f"it is cut off or no checkpoint ({path.stat().st_size:,} bytes; {type(error).__name__}: "
        f"{text[:120]}); download it again"
    )


def _named(text: str) -> str:
    """The part of torch's message that names what the pickle asks for."""
    start = text.lower().find("unsupported global")
    return text[start : start + 100].split(" was not")[0]
