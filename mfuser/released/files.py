"""Reading a released checkpoint: tensors and metadata, nothing is executed or copied."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mfuser.errors import CheckpointError, WeightsError
from mfuser.released import FORMATS, recognize
from mfuser.weightfiles.reading import read_content
from mfuser.weightfiles.unwrapping import UndecidedError, common_prefix, flat, take

log = logging.getLogger("mfuser")


@dataclass(frozen=True)
class Released:
    """state: tensors by released name, mapped from the file. classes: as its metadata names them.
    step: iterations trained. Both None where the file does not say."""

    state: dict[str, Tensor]
    classes: tuple[str, ...] | None
    step: int | None


def read_released(path: Path) -> Released:
    """A .pth of mmsegmentation ({state_dict, meta}), a state dict however wrapped, or .safetensors.

    Raises CheckpointError if the file is missing, truncated, not a checkpoint, or would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    content = read_content(path, CheckpointError, "cut off or no checkpoint", mapped=True)
    tree = content.tree
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not a table of tensors")

    def fit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            recognize(tensors, str(path))
        except CheckpointError as error:
            raise WeightsError(str(error)) from error
        return tensors

    try:
        state = flat(content)
    except WeightsError as error:
        raise CheckpointError(
            f"{path} holds no tensors by name ({', '.join(map(str, list(tree)[:5]))}); a released "
            "checkpoint keeps them under state_dict"
        ) from error
    marks = {mark for form in FORMATS for mark in form.marks}
    try:
        taken = take(content, marks, fit, "a released model", str(path))
        state = taken.tensors
        if taken.others:
            log.warning("%s: %s", path, taken)
    except UndecidedError as error:
        raise CheckpointError(str(error)) from error
    except WeightsError:
        # The caller, who knows what is wanted, says how it differs.
        prefix = common_prefix(state)
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    meta = tree.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    classes, step = meta.get("CLASSES"), meta.get("iter")
    return Released(
        state,
        tuple(map(str, classes)) if isinstance(classes, list | tuple) else None,
        step if isinstance(step, int) else None,
    )
