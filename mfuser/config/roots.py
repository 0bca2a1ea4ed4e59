"""The folders of datasets, looked up in one place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from mfuser.errors import DataError

VARIABLE = "MFUSER_DATA"
"""Environment variable: the folder that holds all datasets by name."""


class DataRoots:
    """Folders of datasets, in this order: --data-root, then MFUSER_DATA, then [data].

    given: "NAME=PATH", or one folder that holds them all. declared: name -> folder, from [data].
    """

    def __init__(self, given: Sequence[str] = (), declared: Mapping[str, Path] | None = None):
        self._given = list(given)
        self._declared = dict(declared or {})

    def find(self, dataset: str) -> Path | None:
        """The folder of a dataset, whether it exists or not; None where none is stated."""
        if (given := self.given(dataset)) is not None:
            return given
        base = os.environ.get(VARIABLE)
        if base and ((Path(base) / dataset).is_dir() or dataset not in self._declared):
            return Path(base).expanduser() / dataset
        return self._declared.get(dataset)

    def given(self, dataset: str) -> Path | None:
        """The folder of a dataset as --data-root states it."""
        for given in self._given:
            name, sep, path = given.partition("=")
            if sep and name == dataset:
                return Path(path).expanduser()
            if not sep:
                return Path(given).expanduser() / dataset
        return None

    def unknown(self, dataset: str) -> DataError:
        """The error for a dataset whose folder is not stated."""
        names = [g.partition("=")[0] for g in self._given if "=" in g] + list(self._declared)
        close = get_close_matches(dataset, names, n=1)
        near = f" (a folder is stated for '{close[0]}')" if close else ""
        return DataError(
            f"the folder of dataset '{dataset}' is not known{near}: give --data-root "
            f"{dataset}=FOLDER, set {VARIABLE} to the folder that holds '{dataset}/', or write "
            f'[data] {dataset} = "FOLDER" in a registry'
        )
