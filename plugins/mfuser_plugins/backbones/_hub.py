"""Models saved in Hugging Face's layout: a folder, or a repository of the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mfuser import WeightsError
from mfuser.errors import MissingExtraError
from mfuser_plugins.backbones._weights import reachable


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


def load_pretrained(source: str, auto: str, unused: tuple[str, ...] = ("pooler.",)) -> Any:
    """(model, config) of a folder or a hub name, float32; from the cache if it is there.

    unused: names that nothing here reads, which may be missing. Raises WeightsError if the model
    is absent, or if its weights do not fill the architecture that its configuration describes.
    """
    package = transformers(f"'{source}'")
    folder = Path(source).expanduser()
    is_path = folder.is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not (folder / "config.json").is_file():
        raise WeightsError(
            f"'{source}': there is no config.json in that folder; give a folder made by "
            "save_pretrained, or a name of the Hugging Face hub"
        )
    where = str(folder) if is_path else source
    try:
        found = _load(package, where, auto, local=True)
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
            found = _load(package, where, auto, local=False)
        except Exception as error:
            raise WeightsError(
                f"'{source}' could not be downloaded ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:160]}): {remedy}"
            ) from error
    model, info = found
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(unused))
    wrong = sorted(str(k) for k in info["mismatched_keys"])
    if missing or wrong:
        names = ", ".join((*missing, *wrong)[:3])
        raise WeightsError(
            f"the weights of '{source}' do not fit its configuration ({type(model).__name__}): "
            f"{len(missing)} missing, {len(wrong)} of another shape ({names}, …)"
        )
    return model, model.config


def _load(package: Any, where: str, auto: str, local: bool) -> Any:
    return getattr(package, auto).from_pretrained(
        where, local_files_only=local, output_loading_info=True, dtype=torch.float32
    )
