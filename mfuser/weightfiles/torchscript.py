"""The tensors of a TorchScript archive, without running the program in it.

OpenAI publishes CLIP in this form, and torch.load refuses it with weights_only=True. The archive
is a zip with a pickle of the module tree and one raw file per storage; only tensors, numbers and
containers are rebuilt, and every other name in the pickle is an error.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Module:
    """Stands for any class that the archive's program defines: it keeps attributes, no code."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


def _list(values: Any, *_: Any) -> Any:
    return values


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, storages: Any) -> None:
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        # Pickles of tensors name this private function; there is no public one that does its work.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_type_tag")):
            return _list
        raise pickle.UnpicklingError(f"unsupported global {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, numel = pid
        return self._storages(dtype, str(key), int(numel))


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Dotted names -> tensors on the CPU.

    Raises pickle.UnpicklingError for anything that would have to be executed, and what zipfile
    raises for a broken archive.
    """
    with zipfile.ZipFile(path) as archive:
        (index,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        root = index.removesuffix("data.pkl")

        def storage(dtype: torch.dtype, key: str, numel: int) -> torch.TypedStorage:
            raw = bytearray(archive.read(f"{root}data/{key}"))
            # An empty buffer has no storage of its own.
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            if len(flat) < numel:
                raise zipfile.BadZipFile(f"storage {key} is cut short")
            # `_rebuild_tensor_v2` takes this class, which warns unless told that torch itself asks.
            return torch.storage.TypedStorage(
                wrap_storage=flat.untyped_storage(), dtype=dtype, _internal=True
            )

        with archive.open(index) as file:
            tree = _Unpickler(file, storage).load()
    return dict(_walk(tree, ""))


def _walk(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, _Module):
        for key, value in dict(node.attributes).items():
            yield from _walk(value, f"{name}.{key}" if name else str(key))
