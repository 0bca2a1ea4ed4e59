"""The towers in miniature, made known to timm and open_clip before either is asked for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def known() -> Any:
    """The module of the miniature towers, registered with both libraries."""
    from mfuser_streets import towers

    towers.register()
    return towers


def tokenizer_file(name: str) -> str:
    """A merges file named in a configuration: as it stands, or beside the miniature's."""
    beside: Path = known().FOLDER / name
    return str(beside) if not Path(name).exists() and beside.is_file() else name
