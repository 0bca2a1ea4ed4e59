"""Errors written for the person who can mend them.

Every error a user can cause is an `MFuserError`: one sentence that says what was given, where,
what is allowed and the nearest fix. The command line prints it and exits with 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MFuserError(Exception):
    """A mistake in what was given: a registry, a file, a dataset, an option."""

    exit_code = 2


class RegistryError(MFuserError):
    """A registry file, table or key that cannot be used."""


class PluginError(MFuserError):
    """A plugin that cannot be loaded or offers something unusable."""


class DataError(MFuserError):
    """A dataset folder, image or label that cannot be used."""


class NoSplitError(DataError):
    """The dataset is there and has no such split."""


class WeightsError(MFuserError):
    """Weights that are missing, broken or belong to another architecture."""


class CheckpointError(MFuserError):
    """A run folder or checkpoint that cannot be used."""


class ElsewhereError(MFuserError):
    """What another process of this command failed with; that one says it."""


class MissingExtraError(MFuserError):
    """An optional dependency that is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{module}', which is not installed: "
            f'pip install "mfuser[{extra}]"'
        )


def placed(error: MFuserError, place: str) -> MFuserError:
    """The same error, saying where it happened."""
    error.args = (f"{place}: {error}",)
    return error


def suggest(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the list of what there is."""
    names = sorted(known)
    close = get_close_matches(given, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    if not names:
        return "; there are none"
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"; there is: {shown}"


def brief(error: Exception) -> str:
    """The first problem of an error, on one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split())
