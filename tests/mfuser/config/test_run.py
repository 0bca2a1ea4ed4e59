"""A run in memory is typed; on disk it is the table that earlier versions wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mfuser import MFuserError, PairingSpec, Registry
from mfuser.config.recipe import RecipeSpec
from mfuser.config.run import Domain, RunSpec
from mfuser.specs import DatasetSpec

WRITTEN = Path(__file__).parent / "written/run.json"
"""Written by the version that kept tables in memory, too."""


@pytest.fixture
def written() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(WRITTEN.read_text("utf-8"))
    return table


def known(table: Any, written: Any) -> Any:
    """The table without keys that an earlier version did not write."""
    if isinstance(table, dict) and isinstance(written, dict):
        return {k: known(v, written[k]) for k, v in table.items() if k in written}
    if isinstance(table, list) and isinstance(written, list) and len(table) == len(written):
        return [known(v, w) for v, w in zip(table, written, strict=True)]
    return table


def test_what_an_earlier_version_wrote_is_read_and_written_again(
    tiny: Registry, written: dict[str, Any]
) -> None:
    run = RunSpec.read(tiny, written, "run.json")
    assert isinstance(run.pairing, PairingSpec) and isinstance(run.recipe, RecipeSpec)
    assert isinstance(run.sources[0].spec, DatasetSpec)
    no_decay = ",".join(written["recipe"]["no_decay"])
    assert run.pairing == tiny.pairing("tiny")
    assert run.recipe == tiny.recipe("tiny", [f"no_decay={no_decay}"])
    again = run.model_dump(mode="json")
    assert known(again, written) == written and list(again) == list(written)


def test_an_unknown_source_is_an_empty_table(tiny: Registry) -> None:
    domain = Domain(name="not stated", spec=None)
    table = domain.model_dump(mode="json")
    assert table == {"name": "not stated", "spec": {}}
    assert tiny.validate(Domain, table, "a checkpoint") == domain
    with pytest.raises(MFuserError, match="the dataset of 'not stated' is unknown"):
        domain.build(tiny, "train")


@pytest.mark.parametrize("where", ["pairing.fusion", "source.spec"])
def test_a_missing_plugin_is_named_in_one_sentence(
    tiny: Registry, written: dict[str, Any], where: str
) -> None:
    outer, inner = where.split(".")
    written[outer][inner] = {"name": "swap"}
    written["plugins"] = ["swap.py"]
    with pytest.raises(MFuserError) as caught:
        RunSpec.read(tiny, written, "runs/x/run.json")
    text = str(caught.value)
    assert text.startswith(f"runs/x/run.json: {where}: ") and "\n" not in text
    assert "is called 'swap'" in text and text.endswith("(the run was made with --plugin swap.py)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"steps": 0}}, r"run\.json: recipe\.steps = 0: .*greater than 0"),
        ({"stpes": 3}, r"run\.json: stpes: there is no such key"),
        ({"pairing": 3}, r"run\.json: pairing = 3"),
        ([], r"run\.json is not the record of a run"),
    ],
)
def test_a_damaged_run_names_the_key(
    tiny: Registry, written: dict[str, Any], change: Any, message: str
) -> None:
    table = {**written, **change} if isinstance(change, dict) else change
    with pytest.raises(MFuserError, match=message):
        RunSpec.read(tiny, table, "run.json")
