"""Datasets recorded under several conditions, each of which is a domain of its own as a target."""

from __future__ import annotations

from typing import ClassVar

from mfuser import DatasetSpec
from mfuser_plugins.datasets._files import PairedSpec


class ByCondition(PairedSpec):
    """condition: one of `CONDITIONS`; none means all of them."""

    CONDITIONS: ClassVar[tuple[str, ...]] = ()
    variant: ClassVar[str | None] = "condition"

    condition: str | None = None

    def chosen(self) -> tuple[str, ...]:
        return self.CONDITIONS if self.condition is None else (self.condition,)

    def expand(self) -> list[DatasetSpec]:
        return [self.model_copy(update={"condition": c}) for c in self.chosen()]
