"""Weights from local files and the hub, checked name by name; nothing in a file is executed."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfuser import WeightsError
from mfuser_plugins.backbones._torchscript import read_torchscript

RANDOM = "random"

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict", "model", "teacher", "module")
_PREFIXES = ("module.", "backbone.")


def local_file(weights: str) -> Path | None:
    """The path that `weights` means, or None where it reads like a tag of the library.

    Raises WeightsError if it reads like a path and no file is there.
    """
    path = Path(weights).expanduser()
    if path.suffix in SUFFIXES or "/" in weights or "\\" in weights or path.is_file():
        if path.is_file():
            return path
        where = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise WeightsError(
            f'weights = "{weights}": {what}{where}; give a file that ends in '
            f'{", ".join(SUFFIXES)}, a name the library knows, or "{RANDOM}"'
        )
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Names -> tensors of a .safetensors, .pth, .pt or .bin file, on the CPU.

    Wrappers that official checkpoints use ({"state_dict": …}, "module." before every name, …) are
    taken off; TorchScript archives are read without their program. Raises WeightsError if the
    file is truncated, is no weights file, or holds anything that would have to be executed.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            # Published checkpoints keep their command line beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                try:
                    content = torch.load(path, map_location="cpu", weights_only=True)
                except RuntimeError as error:
                    if "TorchScript" not in str(error):
                        raise
                    content = read_torchscript(path)
    except Exception as error:
        raise WeightsError(f"{path} cannot be read: {_why_unreadable(path, error)}") from error
    tensors = _unwrap(content)
    if not tensors:
        raise WeightsError(f"{path} holds no named tensors, so it is not a weights file")
    return tensors


def _why_unreadable(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError) and "unsupported global" in text.lower():
        return (
            "it holds more than tensors, and nothing in it is executed; save its tensors as "
            ".safetensors where you trust the file"
        )
    size = path.stat().st_size
    return (
        f"it is truncated or no weights file ({size:,} bytes; {type(error).__name__}: "
        f"{text[:120]}); download it again"
    )


def _unwrap(content: Any) -> dict[str, Tensor]:
    for _ in range(3):
        if not isinstance(content, Mapping) or any(isinstance(v, Tensor) for v in content.values()):
            break
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors


def load_exactly(
    model: nn.Module, tensors: Mapping[str, Tensor], what: str, source: str, spare: str = "(?!)"
) -> None:
    """Copy `tensors` into `model`, name by name, or raise WeightsError and change nothing.

    what, source: the model and the weights, for the message. spare: names (regular expression)
    that may be missing in, or left over from, either side: classifiers, index buffers.
    """
    ignored = re.compile(spare)
    given = {k: v for k, v in tensors.items() if not ignored.match(k)}
    wanted = {k: v for k, v in model.state_dict().items() if not ignored.match(k)}
    missing = sorted(wanted.keys() - given.keys())
    extra = sorted(given.keys() - wanted.keys())
    shapes = [
        f"{name} {_shape(given[name])} instead of {_shape(wanted[name])}"
        for name in sorted(wanted.keys() & given.keys())
        if given[name].shape != wanted[name].shape
    ]
    faults = [
        _few(missing, "missing"),
        _few(extra, "unexpected"),
        _few(shapes, "of another shape"),
    ]
    if any(faults):
        raise WeightsError(
            f"{source} does not fit {what}: {'; '.join(f for f in faults if f)}. "
            "It belongs to another architecture: give the model its weights were made for"
        )
    model.load_state_dict(given, strict=False)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _few(names: Iterable[str], what: str, shown: int = 3) -> str:
    listed = list(names)
    if not listed:
        return ""
    more = ", …" if len(listed) > shown else ""
    return f"{len(listed)} {what} ({', '.join(listed[:shown])}{more})"


def hub_file(repository: str, names: Iterable[str], what: str) -> Path:
    """The first of `names` that a Hugging Face repository has; from the cache if it is there.

    Raises WeightsError, saying how to get it, if there is neither a cached copy nor a network.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    remedy = f"run `hf download {repository}` where there is a network"
    names = tuple(names)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=True))
        except Exception:
            continue
    if constants.HF_HUB_OFFLINE:
        raise _absent(what, "it is not in the cache, and HF_HUB_OFFLINE is set", remedy)
    _reach(constants.ENDPOINT, what, remedy)
    reason = f"{repository} has none of {', '.join(names)}"
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise _absent(what, reason, remedy) from error
    raise _absent(what, reason, remedy)


def url_file(url: str, what: str) -> Path:
    """The file behind a URL, kept in torch.hub's folder. Raises WeightsError as `hub_file`."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    remedy = f"download {url} where there is a network"
    _reach(url, what, remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    except Exception as error:
        raise _absent(what, f"{type(error).__name__}: {error}", remedy) from error
    return path


def reachable() -> bool:
    """Whether the Hugging Face hub answers."""
    from huggingface_hub import constants

    try:
        _reach(constants.ENDPOINT, "", "")
    except WeightsError:
        return False
    return not constants.HF_HUB_OFFLINE


def _reach(url: str, what: str, remedy: str) -> None:
    """Fail within seconds without a network: the hub's client retries for 24 s per file."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return
    except Exception as error:
        raise _absent(what, f"{url} cannot be reached: {error}", remedy) from error


def _absent(what: str, reason: str, remedy: str) -> WeightsError:
    return WeightsError(
        f"the weights of {what} are not on this machine and could not be downloaded ({reason}): "
        f'{remedy}, or give a local file (weights = "path"), or start from nothing '
        f'(weights = "{RANDOM}")'
    )
