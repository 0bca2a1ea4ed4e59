"""Outputs of the released implementation (tests/golden) and how the tests compare with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "golden"


def golden(name: str) -> dict[str, Tensor]:
    """The tensors of one file of released outputs, by their released names."""
    return load_file(FOLDER / f"{name}.safetensors")


def official_keys(kind: str) -> dict[str, Any]:
    """Keys and shapes of a released checkpoint (`eva`, `clip`, `siglip`), and what it trains."""
    packed = (FOLDER / f"official_keys_{kind}.json.gz").read_bytes()
    return dict(json.loads(gzip.decompress(packed)))


def below(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, under the rest of the name."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether the largest difference is within `tolerance` of the largest value.

    The released outputs are float32, whose sums over 130 steps differ by about 1e-6 from another
    order of summation. Shapes must be equal: broadcasting would hide a missing dimension.
    """
    assert got.shape == want.shape, (tuple(got.shape), tuple(want.shape))
    return bool((got - want).abs().max() <= tolerance * want.abs().max())
