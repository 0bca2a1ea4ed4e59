"""How a model is compiled, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from mfuser.specs import Options

Part = Literal["encoders", "adapters", "decoder"]


class CompileSpec(Options):
    """Compilation by torch.compile, block by block.

    parts: "encoders", their blocks; "adapters", those of the fusion, and the enhancer; "decoder".
    mode: torch.compile's. "reduce-overhead" records CUDA graphs, for inference: training then takes
        "default".
    """

    parts: tuple[Part, ...] = ("encoders", "adapters", "decoder")
    mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"


def _switch(value: object) -> object:
    """true: everything, as it comes; false: nothing."""
    if isinstance(value, bool):
        return {} if value else None
    return value


Compilation = Annotated[CompileSpec | None, BeforeValidator(_switch)]
