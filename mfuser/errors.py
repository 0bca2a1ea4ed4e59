"""Errors that tell a user what to change.

Every error a user can cause is an `MFuserError`: one sentence that says what was given, where,
what is allowed and the nearest fix. The command line prints it and exits with 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import InitErrorDetails


class MFuserError(Exception):
    """A mistake in what was given: a registry, a file, a dataset, an option."""

    exit_code = 2


class RegistryError(MFuserError):
    """A registry file, table or key that cannot be used."""


class PluginError(MFuserError):
    """A plugin that cannot be loaded or offers something unusable. plugin: its name or file."""

    def __init__(self, message: str, plugin: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin


class PluginWarning(UserWarning):
    """A plugin changed something of the process that is not its own; it was put back."""


class DataError(MFuserError):
    """A dataset folder, image or label that cannot be used."""


class NoSplitError(DataError):
    """The dataset is there and has no such split."""


class WeightsError(MFuserError):
    """Weights that are missing, broken or belong to another architecture."""


class CheckpointError(MFuserError):
    """A run folder or checkpoint that cannot be used."""


class HubError(MFuserError):
    """A repository of the Hugging Face hub that cannot be read or written."""


class ElsewhereError(MFuserError):
    """The failure of another process of this command, which reports it itself."""


class OutOfMemoryError(MFuserError):
    """Memory ran out; says what took it and what to lower first."""


def out_of_memory(error: BaseException) -> bool:
    """Python's, or torch's: its CPU allocator, drivers of GPUs and Apple's raise RuntimeErrors."""
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return True
    words = ("allocate memory", "out of memory")
    return not isinstance(error, MFuserError) and any(one in str(error) for one in words)


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


def legible(name: str) -> str:
    r"""A file's name as text: bytes that are not UTF-8, which Python keeps as half characters that
    no file and no font takes, are spelled out.

    >>> legible("caf\udce9")
    'caf\\udce9'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def suggest(given: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the list of what there is."""
    names = sorted(known)
    close = get_close_matches(given, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; available: {listed(names)}" if names else "; none are available"


def unknown(given: Iterable[str], known: Iterable[str]) -> str:
    """Each unknown name with the nearest known one; all that there are where one has none near.

    >>> unknown(["rode", "zebra"], ["car", "road"])
    "'rode' (did you mean 'road'?), 'zebra'; available: car, road"
    """
    names, parts, lost = sorted(known), [], False
    for name in given:
        close = get_close_matches(name, names, n=1, cutoff=0.6)
        parts.append(f"'{name}' (did you mean '{close[0]}'?)" if close else f"'{name}'")
        lost = lost or not close
    return ", ".join(parts) + (f"; available: {listed(names)}" if lost else "")


def listed(names: Sequence[str]) -> str:
    """ "a, b, c", cut after 20."""
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


def brief(error: Exception) -> str:
    """The first problem of an error, on one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        path, text = problem(error)
        return f"{'.'.join(path)}{text}" if path else text
    return " ".join(str(error).split())


# ---- what pydantic finds wrong with a table of options


def explained(error: ValidationError, owner: str, keys: Iterable[str]) -> ValidationError:
    """The same error, in which an unknown or a missing key says what its table takes.

    owner: "fusion 'mvfuser'", or "" for a table that is not a component. keys: those it takes.
    Called where both are known: in the table's own class.
    """
    from pydantic import ValidationError

    names = sorted(keys)
    takes = f"{owner or 'this table'} takes {listed(names) or 'no options'}"

    def line(details: Any) -> InitErrorDetails:
        loc = details["loc"]
        kind, own, ctx = details["type"], len(loc) == 1, details.get("ctx", {})
        if kind == "extra_forbidden" and own:
            close = get_close_matches(str(loc[0]), names, n=1, cutoff=0.6)
            near = f"did you mean '{close[0]}'? ({takes})" if close else takes
            kind, ctx = _UNKNOWN, {"text": f"there is no such key; {near}"}
        elif kind == "missing" and own:
            kind, ctx = _MISSING, {"text": "missing" + (f"; {owner} needs it" if owner else "")}
        return _line(details, kind, ctx, loc)

    return ValidationError.from_exception_data(
        error.title, [line(details) for details in error.errors(include_url=False)]
    )


def below(error: ValidationError, key: str) -> ValidationError:
    """The same error, of a table that is written under a further key."""
    from pydantic import ValidationError

    lines = [
        _line(d, d["type"], d.get("ctx", {}), (key, *d["loc"]))
        for d in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(error.title, lines)


def _line(details: Any, kind: str, ctx: Any, loc: tuple[int | str, ...]) -> InitErrorDetails:
    from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

    known: str | PydanticCustomError = kind
    try:
        PydanticKnownError(kind, ctx)  # type: ignore[arg-type]
    except KeyError:  # ours, or one that a plugin's validator raised
        known = PydanticCustomError(kind, "{text}", {"text": details["msg"], **ctx})
    return InitErrorDetails(type=known, ctx=ctx, loc=loc, input=details["input"])


_UNKNOWN, _MISSING = "unknown_key", "missing_key"


def problem(error: ValidationError, table: Any = None) -> tuple[list[str], str]:
    """The first problem of a validation error: the path of keys as written in `table`, and
    " = VALUE: what is wrong" (or ": what is wrong"), with how many more there are."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for details in error.errors(include_url=False):
        found.setdefault(_as_written(details, table), []).append(details)
    path, same = next(iter(found.items()))
    text = " or ".join(dict.fromkeys(_said(details, k > 0) for k, details in enumerate(same)))
    if same[0]["type"] not in (_UNKNOWN, _MISSING, "missing", "extra_forbidden", "value_error"):
        text = f" = {_short(same[0]['input'])}: {text}"
    elif path:
        text = f": {text}"
    return list(path), text + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _as_written(details: Any, table: Any) -> tuple[str, ...]:
    """Keys and indices from the top; what pydantic adds to tell a union's members apart is cut.

    Indices are pydantic's, from 0; a number written as a key ("vfm.1") counts from 1.
    """
    path: list[str] = []
    absent = details["type"] in (_MISSING, "missing")
    for part in details["loc"]:
        numbers = range(len(table)) if isinstance(table, list | tuple) else range(0)
        index = int(part) - 1 if isinstance(part, str) and part.isdecimal() else part
        if isinstance(table, Mapping) and part in table:
            table = table[part]
        elif index in numbers:
            table = table[index]
        elif not absent and table is not None:
            break
        path.append(str(part))
    return tuple(path)


def _said(details: Any, again: bool) -> str:
    message = str(details["msg"]).removeprefix("Value error, ")
    if details["type"] in (_UNKNOWN, _MISSING, "value_error"):
        return message
    message = message.removeprefix("Input should be ") if again else message
    return message[0].lower() + message[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
