"""Locates a fault in a plugin's own code, wherever it came to light."""

from __future__ import annotations

import inspect
import traceback
from typing import Any


def root(error: BaseException) -> BaseException:
    """The first of a chain of errors raised `from` each other."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def raised_in(error: BaseException, package: str) -> str:
    """ "FILE, line N" of the innermost frame inside `package`; "" where there is none."""
    found = ""
    for frame, line in traceback.walk_tb(root(error).__traceback__):
        if frame.f_globals.get("__name__", "").split(".")[0] == package:
            found = f"{frame.f_code.co_filename}, line {line}"
    return found


def defined_at(thing: Any) -> str:
    """ "FILE, line N" where a class or function is defined; "" where there is no source."""
    try:
        _, line = inspect.getsourcelines(thing)
        return f"{inspect.getsourcefile(thing)}, line {line}"
    except (OSError, TypeError):
        return ""


def place(error: BaseException, spec: type) -> str:
    """Where the component of `spec` raised; if it raised nothing, where its build is defined."""
    package = spec.__module__.split(".")[0]
    return raised_in(error, package) or defined_at(getattr(spec, "build", spec)) or defined_at(spec)
