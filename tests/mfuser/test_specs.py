"""Specs: names, kinds, what they refuse, components inside components."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import SerializeAsAny, ValidationError

from mfuser import DecoderSpec, FusionSpec, Options, TokenShape, component_of
from mfuser.errors import PluginError
from mfuser.specs import KINDS, ImageSize


class SwapSpec(FusionSpec, name="swap"):
    """Swaps."""

    share: float = 0.1

    def build(self, vfm, vlm):  # type: ignore[no-untyped-def]
        return None


class Sized(Options):
    size: ImageSize


def test_name_and_kind_come_from_the_class() -> None:
    assert SwapSpec.component() == "swap"
    assert SwapSpec.kind == "fusion"
    assert SwapSpec().name == "swap"
    assert SwapSpec().model_dump() == {"every": 1, "name": "swap", "share": 0.1}


def test_another_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="swap"):
        SwapSpec(name="other")  # type: ignore[call-arg]


def test_unknown_keys_are_refused_and_values_are_frozen() -> None:
    with pytest.raises(ValidationError, match="shaer"):
        SwapSpec(shaer=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        SwapSpec().share = 2.0  # type: ignore[misc]


def test_numbers_are_finite() -> None:
    with pytest.raises(ValidationError, match="finite"):
        SwapSpec(share=float("inf"))


def test_a_subclass_of_a_component_needs_a_name_of_its_own() -> None:
    with pytest.raises(PluginError, match='class Twice.*name="…"'):

        class Twice(SwapSpec):
            pass


def test_a_component_can_be_subclassed_under_another_name() -> None:
    class WideSwapSpec(SwapSpec, name="wide_swap"):
        width: int = 3

    assert WideSwapSpec.component() == "wide_swap"
    assert SwapSpec.component() == "swap"
    assert WideSwapSpec(share=0.5).model_dump() == {
        "name": "wide_swap",
        "every": 1,
        "share": 0.5,
        "width": 3,
    }


def test_kinds_are_those_of_the_architecture_of_training_and_of_inference() -> None:
    assert list(KINDS) == [
        *("vision", "vision_language", "fusion", "tuning", "enhancer", "decoder", "loss"),
        *("inference", "dataset"),
    ]


@pytest.mark.parametrize(
    ("given", "size"), [(224, (224, 224)), ([64, 96], (64, 96)), ((1, 2), (1, 2))]
)
def test_image_sizes(given: object, size: tuple[int, int]) -> None:
    assert Sized(size=given).size == size


@pytest.mark.parametrize("given", ["224", [64], [1, 2, 3], {"height": 3}, None, 0, -5, [64, 0]])
def test_what_is_no_image_size(given: object) -> None:
    with pytest.raises(ValidationError):
        Sized(size=given)


def test_tokens_count_prefix_and_grid() -> None:
    assert TokenShape(embed_dim=8, grid=(3, 5), num_prefix_tokens=2).num_tokens == 17


def test_a_component_holds_a_component() -> None:
    class Outer(Options):
        inner: Annotated[SerializeAsAny[DecoderSpec], component_of("decoder")]

    outer = Outer(inner="linear")  # type: ignore[arg-type]
    assert outer.inner.name == "linear"
    assert Outer.model_validate(outer.model_dump()) == outer
    with pytest.raises(ValidationError, match="did you mean 'linear'"):
        Outer(inner={"name": "lineer"})  # type: ignore[arg-type]
    with pytest.raises(
        ValidationError, match="expected the name of a decoder component, or a table with a"
    ):
        Outer(inner=3)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="has no 'name'"):
        Outer(inner={})  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"not \[1\]"):
        Outer(inner={"name": [1]})  # type: ignore[arg-type]
