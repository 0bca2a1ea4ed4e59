"""Several sources by name and weight, in commands and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mfuser import Registry, load_registry
from mfuser.config.run import RunSpec
from mfuser.errors import MFuserError

RECIPES = """
[recipe.both]
extends = "tiny"
sources = [{ name = "toy", weight = 0.25 }, { name = "toy-night", weight = 0.75 }]

[recipe.tables]
extends = "tiny"
[[recipe.tables.sources]]
name = "toy"
[[recipe.tables.sources]]
name = "streets:fog"

[recipe.one]
extends = "both"
source  = "toy-night"

[dataset.again]
extends = "toy"
split   = "val"
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_toml: str) -> Registry:
    path = tmp_path_factory.mktemp("sources") / "registry.toml"
    path.write_text(tiny_toml + RECIPES, "utf-8")
    return load_registry(path)


def made(
    registry: Registry, recipe: str = "tiny", *changes: str, source: str | None = None
) -> RunSpec:
    pairing, spec = registry.pairing("plain"), registry.recipe(recipe, changes)
    return RunSpec.of(registry, "plain", recipe, pairing=pairing, recipe=spec, source=source)


@pytest.mark.parametrize(
    ("recipe", "changes", "source", "shares"),
    [
        ("tiny", (), None, {"toy": 1.0}),
        ("tiny", (), "toy,toy-night", {"toy": 0.5, "toy-night": 0.5}),
        ("tiny", (), " toy = 0.2 , toy-night=0.8", {"toy": 0.2, "toy-night": 0.8}),
        ("tiny", ("source=toy,toy-night",), None, {"toy": 0.5, "toy-night": 0.5}),
        ("tiny", ("sources=toy,streets:fog",), None, {"toy": 0.5, "streets:fog": 0.5}),
        (
            *("tiny", (), "toy=0.333,toy-night=0.333,streets:fog=0.333"),
            {"toy": 1 / 3, "toy-night": 1 / 3, "streets:fog": 1 / 3},
        ),
        ("both", (), None, {"toy": 0.25, "toy-night": 0.75}),
        ("both", (), "toy", {"toy": 1.0}),
        ("both", ('sources=["toy"]',), None, {"toy": 1.0}),
        ("tables", (), None, {"toy": 0.5, "streets:fog": 0.5}),
        ("one", (), None, {"toy-night": 1.0}),  # replaces the sources that it inherits
    ],
)
def test_sources_and_their_shares(
    registry: Registry,
    recipe: str,
    changes: tuple[str, ...],
    source: str | None,
    shares: dict[str, float],
) -> None:
    run = made(registry, recipe, *changes, source=source)
    assert {s.name: s.share for s in run.sources} == pytest.approx(shares)
    table = run.model_dump(mode="json")
    # One source is written as ever, and both forms are read back.
    assert ("source" in table, "sources" in table) == (len(shares) == 1, len(shares) > 1)
    assert RunSpec.read(registry, table, "run.json") == run


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ((), "toy=0.5,toy-night=0.4", "--source toy.*sum to 0.9, not 1; .* are 0.556, 0.444"),
        ((), "toy=0.5,toy-night", "1 of 2 sources have a weight, and 'toy-night' has none"),
        ((), "toy=-1,toy-night=2", "the weight of 'toy' is its share .* not -1"),
        ((), "toy=half", "the weight of 'toy' is a number such as 0.5, not 'half'"),
        ((), "toy,toy", "source 'toy' is given twice"),
        ((), "toy,again", "sources 'toy' and 'again' are the same images"),
        ((), "toy,toyy", r"no dataset is called 'toyy'; did you mean 'toy'\?"),
        ((), "acdc,toy", "--source acdc stands for 4 domains .acdc:fog, .*separated by commas"),
        ((), ",", "--source names no dataset"),
        (('sources=[{name="toy", weight=-0.5}]',), None, r"sources\.0\.weight = -0.5: .*0.001"),
        (('sources=[{name="toy", wieght=1}]',), None, r"sources\.0\.wieght: .* mean 'weight'"),
        (('sources=[{name="toy", weight=0.5}]',), None, "sum to 0.5, not 1"),
        (('source="toy"', 'sources=["toy"]'), None, "'source' and 'sources' are both given"),
        (("source=toy=2",), None, "the weight of 'toy' is its share"),
        (("sources=[]",), None, "recipe 'tiny' names no source: give --source"),
    ],
)
def test_sources_that_do_not_go_together(
    registry: Registry, changes: tuple[str, ...], source: str | None, message: str
) -> None:
    with pytest.raises(MFuserError, match=message) as caught:
        made(registry, "tiny", *changes, source=source)
    assert "\n" not in str(caught.value)


def test_bad_sources_end_the_command(mfuser: Any, write_registry: Any, inside: Path) -> None:
    end = mfuser(
        *("train", "plain", "--recipe", "tiny", "--registry", write_registry(), "--out", "run"),
        *("--source", "toy=0.5,toy-night=0.6"),
    )
    assert end.code == 2 and not Path("run").exists()
    assert end.err.count("\n") == 1 and "sum to 1.1, not 1" in end.err
