"""The content of a weights file, on the CPU; no code in it runs."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from mfuser.errors import MFuserError, WeightsError
from mfuser.weightfiles.torchscript import read_torchscript

RECORDS = (
    "accelerate.", "addict.", "collections.defaultdict", "datetime.", "deepspeed.", "detectron2.",
    "easydict.", "fvcore.", "lightning.", "lightning_fabric.", "lightning_utilities.", "mmcv.",
    "mmengine.", "mmseg.", "ml_collections.", "numpy.random.", "omegaconf.", "pytorch_lightning.",
    "types.SimpleNamespace", "typing.", "yacs.", "builtins.dict", "builtins.list", "builtins.int",
    "builtins.float", "builtins.str", "builtins.bool", "builtins.tuple",
)  # fmt: skip
"""Beginnings of the names of what training frameworks keep beside the weights: configurations,
logs, loop states. None of it is imported; a `_Record` without content stands in its place."""

SHOWN = 3


@dataclass(frozen=True)
class Content:
    """tree: what the file holds, tensors and containers. metadata: a safetensors file's own."""

    path: Path
    tree: Any
    metadata: dict[str, str] = field(default_factory=dict)


class _Record:
    """Stands for an object of a class that is not imported: it takes what is pickled, keeps
    nothing and runs nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Record:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _mapping(*_: Any) -> dict[Any, Any]:
    """Stands for collections.defaultdict, whose factory is not taken over."""
    return {}


def read_content(
    path: Path,
    error: type[MFuserError] = WeightsError,
    what: str = "truncated or not a weights file",
    *,
    mapped: bool = False,
) -> Content:
    """The contents of a .safetensors file, a torch.save file or a TorchScript archive.

    The content decides the format, not the suffix. Raises `error` if the file is truncated,
    is in another format, or holds objects that code would have to run for; what: the wording for a
    file that is neither. mapped: tensors of a torch.save file may stay in the file, which then must
    not change while they are used.
    """
    if (other := _other_format(path)) is not None:
        raise error(f"{path} cannot be read: {other}")
    try:
        if is_safetensors(path):
            return _safetensors(path)
        return Content(path, _torch(path, mapped))
    except MFuserError:
        raise
    except Exception as fault:
        raise error(f"{path} cannot be read: {_why_unreadable(path, fault, what)}") from fault


def _head(path: Path, length: int = 512) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its first bytes, or is meant to be by its suffix."""
    head = _head(path, 9)
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return True
    # A truncated one is for its own reader to refuse.
    return path.suffix == ".safetensors" and not head.startswith(b"PK")


def _safetensors(path: Path) -> Content:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Content(path, tensors, file.metadata() or {})


def _torch(path: Path, mapped: bool) -> Any:
    with torch.serialization.safe_globals(_plain_values() + _records(path)):
        try:
            if mapped and path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error) and "TorchScript" not in str(error):
                raise
        try:
            # Not by its path, whose suffix torch.load goes by.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
            return read_torchscript(path)


def _plain_values() -> list[Any]:
    """Values without code that published checkpoints keep beside the weights: their command line,
    scores as NumPy scalars, paths."""
    scalar: Any = np.float64(0).__reduce__()[0]
    array: Any = np.zeros(1).__reduce__()[0]
    plain: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, scalar, array]
    # The modules' names before and since NumPy 2.
    for core in ("core", "_core"):
        plain += [(scalar, f"numpy.{core}.multiarray.scalar")]
        plain += [(array, f"numpy.{core}.multiarray._reconstruct")]
    plain += [
        type(np.dtype(t))
        for t in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "U1")
    ]
    for module in ("pathlib", "pathlib._local"):
        plain += [(PurePosixPath, f"{module}.PosixPath"), (PurePosixPath, f"{module}.Path")]
        plain += [(PurePosixPath, f"{module}.PurePosixPath")]
        plain += [(PureWindowsPath, f"{module}.WindowsPath")]
    return plain


def _records(path: Path) -> list[tuple[Callable[..., Any], str]]:
    """Stand-ins for the frameworks' own classes that a zip archive of torch.save names."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # another format, TorchScript, a broken file: for torch.load to say
        return []
    found: list[tuple[Callable[..., Any], str]] = []
    for name in names:
        if name == "collections.defaultdict":
            found.append((_mapping, name))
        elif name.startswith(RECORDS):
            # A class each: torch looks them up by identity.
            found.append((type(name.rpartition(".")[2], (_Record,), {}), name))
    return found


def _other_format(path: Path) -> str | None:
    """The format, and what to do, where it cannot be read here."""
    head = _head(path)
    start = head.lstrip()[:64].lower()
    if head.startswith(b"version https://git-lfs"):
        return (
            "it is a pointer of Git LFS, not the file itself; run `git lfs pull` where it is from"
        )
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return (
            "it is a web page, saved in place of the weights (a login, an error); download it again"
        )
    if head.startswith(b"\x93NUMPY") or path.suffix == ".npz":
        return "it is a NumPy file; save its arrays as tensors, by name, in a .safetensors file"
    if head.startswith(b"\x89HDF"):
        return "it is an HDF5 file (Keras); convert it with the library that wrote it"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file of quantized weights; give the original ones"
    if path.suffix == ".onnx":
        return "it is an ONNX graph; give the weights that it was exported from"
    if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
        return "it is a packed archive; unpack it and give the weights file inside"
    if start.startswith((b"{", b"[")):
        return _json(path)
    return None


def _json(path: Path) -> str:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        return "it is a text file, not weights"
    shards = sorted(set(content.get("weight_map", {}).values())) if type(content) is dict else []
    if shards:
        return (
            f"it is the index of {len(shards)} files ({', '.join(shards[:SHOWN])}, …); save them "
            "as one, or give the folder to the component 'transformers'"
        )
    return "it is a JSON file, a configuration perhaps; give the weights beside it"


def _why_unreadable(path: Path, error: Exception, what: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError) and any(
        word in text.lower() for word in ("unsupported global", "whose module", "reduce for")
    ):
        return _needs_code(path, text)
    if zipfile.is_zipfile(path) and "pickle" not in text and not _holds_pickle(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        return f"it is a zip archive of other things ({', '.join(names[:SHOWN])}, …), not weights"
    size = path.stat().st_size
    return f"it is {what} ({size:,} bytes; {type(error).__name__}: {text[:120]}); download it again"


def _holds_pickle(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


def _needs_code(path: Path, text: str) -> str:
    """Why a pickle is refused: a whole module, or objects beside the weights."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        # The part of torch's message that names what the pickle asks for.
        start = max(text.lower().find("unsupported global"), 0)
        names = [text[start : start + 100].split(" was not")[0]]
    names = [n for n in names if not n.startswith(RECORDS)] or names
    modules = [n for n in names if n.startswith("torch.nn.modules.")]
    own = [n for n in names if n not in modules]
    shown = ", ".join((own + modules)[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    if modules:
        return (
            f"it holds more than tensors, and nothing in it is executed: it is a pickled module "
            f"({shown}); where it was made and you trust it, load it and save its state_dict(): "
            "safetensors.torch.save_file(model.state_dict(), …)"
        )
    return (
        f"it holds more than tensors, and nothing in it is executed ({shown}); save its tensors "
        "as .safetensors where you trust the file"
    )
