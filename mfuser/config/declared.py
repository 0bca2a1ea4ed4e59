"""The base of what a registry declares by name: pairings, recipes, studies."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from mfuser.errors import RegistryError, problem
from mfuser.specs import Options


class Declared(Options):
    """A table of a registry. Made in Python, it refuses what a file's is refused for, in the same
    sentence: RegistryError."""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            path, text = problem(error, options)
            raise RegistryError(f"{type(self).__name__}: {'.'.join(path)}{text}") from error

    # Without this, pydantic would also call it for `model_validate`, whose context (the components)
    # an __init__ is not given. There is no public way to say so.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]
