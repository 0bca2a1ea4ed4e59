"""No adapters: both encoders run alone, their taps are concatenated (paper, table 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mfuser import FusionSpec, TokenShape, hookimpl


class NoFusionSpec(FusionSpec, name="none"):
    """No exchange between the encoders: their features meet in the pyramid only."""

    single_tower: ClassVar[bool] = True
    any_number: ClassVar[bool] = True

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> None:
        return None

    def build_many(self, shapes: Mapping[str, TokenShape]) -> None:
        return None


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [NoFusionSpec]
