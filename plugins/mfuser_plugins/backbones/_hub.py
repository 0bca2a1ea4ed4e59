"""Models saved in Hugging Face's layout: a folder, or a repository of the hub."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mfuser import MFuserError, WeightsError
from mfuser.errors import MissingExtraError
from mfuser.weightfiles.reading import read_content
from mfuser.weightfiles.unwrapping import take
from mfuser_plugins.backbones._weights import (
    RANDOM,
    Tensors,
    local_file,
    part_of,
    reachable,
    tell,
)


def transformers(purpose: str) -> Any:
    """The transformers package. Raises MissingExtraError where it is not installed."""
    try:
        import transformers as package
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", purpose) from error
    return package


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(
    source: str, auto: str, weights: str | None = None, unused: tuple[str, ...] = ("pooler.",)
) -> tuple[Any, Any]:
    """(model, config) of a folder or a hub name, float32; from the cache if it is there.

    weights: None: those of the folder or hub name; "random": the architecture alone, no weights
    are looked for; else a local file of that architecture. unused: names that nothing here reads,
    which may be missing. Raises WeightsError if the model is absent, or if the weights do not fill
    the architecture that its configuration describes.
    """
    package = transformers(f"'{source}'")
    if weights is not None:
        config = _found(source, package.AutoConfig.from_pretrained)
        return from_config(config, auto, source, weights, unused), config
    load = functools.partial(
        getattr(package, auto).from_pretrained, output_loading_info=True, dtype=torch.float32
    )
    model, info = _found(source, load)
    if fault := _misfit(model, info, unused):
        raise WeightsError(
            f"the weights of '{source}' do not fit its configuration ({type(model).__name__}): "
            f"{fault}"
        )
    return model, model.config


def from_config(
    config: Any, auto: str, source: str, weights: str, unused: tuple[str, ...] = ("pooler.",)
) -> Any:
    """A model of a configuration, random or with the weights of a local file.

    Raises WeightsError as `load_pretrained`, MFuserError for a configuration that fits no model.
    """
    package = transformers(f"'{source}'")
    try:
        model = getattr(package, auto).from_config(config, dtype=torch.float32)
    except Exception as error:
        raise MFuserError(
            f"transformers cannot build '{source}': {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if weights == RANDOM:
        return model
    path = local_file(weights)
    if path is None:
        raise WeightsError(
            f'weights = "{weights}" of \'{source}\': give a local file, or "{RANDOM}"; without the '
            "key the weights are those of 'model'"
        )
    kind, names, what = type(model), set(model.state_dict()), f"transformers model '{source}'"
    loaded: list[Any] = []

    def fit(tensors: Tensors) -> Tensors:
        # The class itself knows the names that older versions of the library wrote.
        found, info = kind.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True,
            dtype=torch.float32,
        )  # fmt: skip
        if fault := _misfit(found, info, unused):
            raise WeightsError(f"'{weights}' does not fit {what}: {fault}")
        loaded[:] = [found]
        return tensors

    tell(
        f"'{weights}'", take(read_content(path), names, fit, what, f"'{weights}'", part_of(weights))
    )
    return loaded[0]


def _misfit(model: Any, info: Any, unused: tuple[str, ...]) -> str:
    """Names the parameters that from_pretrained could not fill; empty if none."""
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(unused))
    wrong = sorted(str(k) for k in info["mismatched_keys"])
    if not missing and not wrong:
        return ""
    names = ", ".join((*missing, *wrong)[:3])
    return f"{len(missing)} missing, {len(wrong)} of another shape ({names}, …)"


def _found(source: str, load: Callable[..., Any]) -> Any:
    """Call a from_pretrained method for a folder or a hub name. Raises WeightsError if it is
    absent or broken."""
    folder = Path(source).expanduser()
    is_path = folder.is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not (folder / "config.json").is_file():
        raise WeightsError(
            f"'{source}': there is no config.json in that folder; give a folder made by "
            "save_pretrained, or a name of the Hugging Face hub"
        )
    try:
        return load(str(folder) if is_path else source, local_files_only=True)
    except Exception as offline:
        if is_path:
            raise WeightsError(
                f"'{source}' cannot be loaded: {type(offline).__name__}: "
                f"{' '.join(str(offline).split())[:200]}"
            ) from offline
        remedy = (
            f"run `hf download {source}` where there is a network, or give a folder made by "
            "save_pretrained"
        )
        if not reachable():
            raise WeightsError(
                f"'{source}' is not on this machine, and the Hugging Face hub cannot be reached: "
                f"{remedy}"
            ) from offline
        try:
            return load(source, local_files_only=False)
        except Exception as error:
            raise WeightsError(
                f"'{source}' could not be downloaded ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:160]}): {remedy}"
            ) from error
