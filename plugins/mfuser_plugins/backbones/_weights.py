"""Weights from local files and the hub, checked name by name; nothing in a file is executed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mfuser import WeightsError
from mfuser.weightfiles.reading import read_content
from mfuser.weightfiles.unwrapping import Taken, common_prefix, flat, take

log = logging.getLogger("mfuser")

RANDOM = "random"

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

Tensors = dict[str, Tensor]


def local_file(weights: str) -> Path | None:
    """The path that `weights` means, or None where it reads like a tag of the library.

    "FILE#PART" means the file, too (see `part_of`). Raises WeightsError if it reads like a path
    and no file is there.
    """
    path = Path(weights).expanduser()
    if not path.is_file() and "#" in weights:
        path = Path(weights.partition("#")[0]).expanduser()
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


def part_of(weights: str) -> str | None:
    """ "student" of "dino.pth#student": the part of the file that is meant, where one is chosen."""
    if "#" not in weights or Path(weights).expanduser().is_file():
        return None
    return weights.partition("#")[2] or None


def read_tensors(path: Path) -> Tensors:
    """Names -> tensors of a weights file, on the CPU, without the usual wrappers around all names.

    For files of which no model says what names to look for. Raises WeightsError if the file is
    truncated, is not a weights file, or holds anything that would have to be executed.
    """
    tensors = flat(read_content(path))
    prefix = common_prefix(tensors)
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def load_file(
    model: nn.Module,
    path: Path,
    what: str,
    weights: str,
    convert: Callable[[Tensors], Tensors],
    *,
    published: Collection[str] = (),
    spare: str = "(?!)",
) -> Taken:
    """Copy the part of a file that fits into `model`, name by name, and log what was taken.

    what, weights: the model and the weights as given, for messages. convert: published names ->
    the model's. published: names by which files in another naming are recognized. spare: as for
    `check_exactly`. Raises WeightsError, changing no weight of the model, if nothing fits.
    """
    source = f"'{weights}'"

    def fit(tensors: Tensors) -> Tensors:
        converted = convert(dict(tensors))
        check_exactly(model, converted, what, source, spare)
        return converted

    names = {*model.state_dict(), *published}
    taken = take(read_content(path), names, fit, what, source, part_of(weights))
    model.load_state_dict(_without(taken.tensors, spare), strict=False)
    tell(source, taken)
    return taken


def tell(source: str, taken: Taken) -> None:
    """Log what was taken of a file, where the file holds more than that."""
    if text := str(taken):
        log.log(
            logging.WARNING if taken.others or taken.left else logging.INFO, "%s: %s", source, text
        )


def check_exactly(
    model: nn.Module, tensors: Mapping[str, Tensor], what: str, source: str, spare: str = "(?!)"
) -> None:
    """Raises WeightsError unless `tensors` are those of `model`, name by name.

    what, source: the model and the weights, for the message. spare: names (regular expression)
    that may be missing in, or left over from, either side: classifiers, index buffers.
    """
    given, wanted = _without(tensors, spare), _without(model.state_dict(), spare)
    missing = sorted(wanted.keys() - given.keys())
    extra = sorted(given.keys() - wanted.keys())
    common = sorted(wanted.keys() & given.keys())
    shapes = [
        f"{name} {_shape(given[name])} instead of {_shape(wanted[name])}"
        for name in common
        if given[name].shape != wanted[name].shape
    ]
    quantized = [
        f"{name} {str(given[name].dtype).removeprefix('torch.')}"
        for name in common
        if wanted[name].is_floating_point() and not given[name].is_floating_point()
    ]
    faults = [
        _few(missing, "missing"),
        _few(extra, "unexpected"),
        _few(shapes, "of another shape"),
        _few(quantized, "quantized"),
    ]
    if any(faults):
        raise WeightsError(
            f"{source} does not fit {what}: {'; '.join(f for f in faults if f)}. "
            "It belongs to another architecture: give the model its weights were made for"
        )


def _without(tensors: Mapping[str, Tensor], spare: str) -> Tensors:
    ignored = re.compile(spare)
    return {k: v for k, v in tensors.items() if not ignored.match(k)}


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
