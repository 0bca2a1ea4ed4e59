"""Tables, files and plots of results; what an adapter costs."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from mfuser import load_registry
from mfuser.reporting import adapter_cost
from mfuser.study import adapters, plot
from mfuser.study.report import AVERAGE, Results, Row, Score
from mfuser.study.results import save
from mfuser.study.runs import Inputs


def row(label: str, values: dict[int, float], states=None, **more) -> Row:  # type: ignore[no-untyped-def]
    return Row(
        label=label,
        choices={"fusion": label},
        trained=1_500_000,
        states=states or dict.fromkeys(values, "finished"),
        messages=more.get("messages", {}),
        scores={"night": Score.of(values), AVERAGE: Score.of(values)} if values else {},
        paper=more.get("paper", {}),
    )


def results(*rows: Row) -> Results:
    protocol = {
        "source": "game",
        "steps": 4,
        "batch": 1,
        "window": [64, 96],
        "stride": [43, 64],
        "classes": "those that each target labels",
        "images per domain": 2,
        "checkpoint": "the last one",
    }
    return Results(
        study="s",
        base="tiny",
        protocol=protocol,
        notes=[],
        domains=["night"],
        seen=[],
        rows=list(rows),
    )


def test_mean_and_standard_deviation_are_the_samples() -> None:
    score = Score.of({0: 0.5, 1: 0.52, 2: 0.54})
    assert score.text() == "52.0 ± 2.0"
    assert Score.of({0: 0.5}).text() == "50.0"
    assert Score.of({}).text() == ""


def test_a_seed_that_diverged_is_counted_and_not_averaged() -> None:
    found = results(
        row(
            "a",
            {0: 0.5, 2: 0.52},
            {0: "finished", 1: "diverged", 2: "finished"},
            messages={1: "the loss is nan at step 3"},
        )
    )
    markdown = found.markdown()
    assert "| a | 2 of 3, 1 diverged | 1.50 M | 51.0 ± 1.4 | 51.0 ± 1.4 |" in markdown
    assert "a, seed 1 diverged: the loss is nan at step 3" in markdown


def test_the_papers_column_only_where_a_row_has_it() -> None:
    assert "paper" not in results(row("a", {0: 0.5})).markdown().lower()
    found = results(row("a", {0: 0.5}, paper={"night": 57.94}), row("b", {0: 0.4}))
    lines = found.markdown().splitlines()
    assert "| variant | seeds | trained | night | paper | unseen average |" in lines
    assert "| a | 1 of 1 | 1.50 M | 50.0 | 57.94 | 50.0 |" in lines
    assert "| b | 1 of 1 | 1.50 M | 40.0 |  | 40.0 |" in lines
    table = list(csv.DictReader(io.StringIO(found.csv())))
    assert [(r["variant"], r["domain"], r["paper"]) for r in table] == [
        ("a", "night", "57.94"),
        ("a", AVERAGE, ""),
        ("b", "night", ""),
        ("b", AVERAGE, ""),
    ]


def test_files_and_plot(tmp_path: Path) -> None:
    found = results(row("a", {0: 0.5, 1: 0.6}), row("b", {}, {0: "diverged", 1: "open"}))
    missing = save(found, tmp_path)
    assert Results.model_validate(json.loads((tmp_path / "results.json").read_text())) == found
    pytest.importorskip("matplotlib")
    assert missing is None
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "![results.png](results.png)" in (tmp_path / "results.md").read_text("utf-8")


def test_without_matplotlib_the_plot_is_named_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    missing = save(results(row("a", {0: 0.5})), tmp_path)
    assert missing == plot.MISSING and "mfuser[plot]" in missing
    assert not (tmp_path / "results.png").exists()
    assert "results.png" not in (tmp_path / "results.md").read_text("utf-8")


# ---- measuring


@pytest.fixture(scope="module")
def mvfuser():  # type: ignore[no-untyped-def]
    return load_registry().components.validate(("fusion",), "mvfuser")


def test_an_adapter_is_measured(mvfuser) -> None:  # type: ignore[no-untyped-def]
    cost = adapter_cost.adapter_cost(mvfuser, width=64, grid=(4, 4), batch=2, repeats=2)
    assert cost.tokens == 34 and cost.batch == 2
    built = mvfuser.build(*[adapter_cost.TokenShape(64, (4, 4), 1)] * 2)
    assert cost.params == sum(p.numel() for p in built.parameters())
    assert cost.flops is not None and cost.scan_flops is not None
    assert cost.flops > cost.scan_flops > 0
    assert cost.forward.p50 > 0 and cost.backward is not None and cost.backward.p50 > 0


@pytest.mark.parametrize(
    ("name", "params_m", "gflops"),
    [
        ("self_attention_concat", "4.20", "98.64"),
        ("self_attention_separate", "8.40", "71.08"),
        ("bi_deformable_attention", "3.35", "34.65"),
        ("mvfuser", "1.67", "17.21"),
    ],
)
def test_sizes_of_table_3(name: str, params_m: str, gflops: str) -> None:
    registry = load_registry()
    if name not in registry.components.kind("fusion"):
        pytest.skip(f"{name} is not installed")
    spec = registry.components.validate(("fusion",), name)
    shape = adapter_cost.TokenShape(1024, (36, 36), 1)
    adapter = spec.build(shape, shape)  # type: ignore[attr-defined]
    flops, _ = adapter_cost._flops(spec, shape, 2, name, 2)  # type: ignore[arg-type]
    assert f"{sum(p.numel() for p in adapter.parameters()) / 1e6:.2f}" == params_m
    assert flops is not None and f"{flops / 1e9:.2f}" == gflops


def test_the_exponent_of_a_power_law() -> None:
    assert adapter_cost.exponent([(n, 3e-9 * n**2) for n in (512, 1024, 4096)]) == pytest.approx(2)
    assert adapter_cost.exponent([(512, 1.0)]) is None


def test_a_curve_stops_before_a_pass_that_takes_too_long(mvfuser) -> None:  # type: ignore[no-untyped-def]
    curve = adapter_cost.growth(mvfuser, tokens=[4, 8, 1 << 30], width=16, batch=1, limit=5)
    assert [p.tokens for p in curve.points] == [8, 16]
    assert curve.stopped is not None and "over 5 s" in curve.stopped


@pytest.mark.parametrize(("tokens", "grid"), [(256, (16, 16)), (512, (16, 32)), (7, (1, 7))])
def test_grids_are_nearly_square(tokens: int, grid: tuple[int, int]) -> None:
    assert adapter_cost.square(tokens) == grid


def test_the_adapter_study_without_data(inside: Path, write_registry, mfuser) -> None:  # type: ignore[no-untyped-def]
    write_registry(
        '[study.a]\nkind = "adapters"\nadapters = ["mvfuser"]\nwidth = 32\ngrid = [2, 2]\n'
        "curve = [4, 8, 16]\npaper = { table = 3 }\n"
    )
    outcome = mfuser("ablate", "a", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    found = adapters.AdapterResults.model_validate(json.loads(outcome.out))
    assert [c.adapter for c in found.costs] == ["mvfuser"]
    assert [p.tokens for p in found.growth[0].points] == [8, 16, 32]
    assert found.growth[0].exponent is not None
    assert found.paper == {}  # other sizes than the paper's
    text = (inside / "studies" / "a" / "results.md").read_text("utf-8")
    assert "µs per token" in text and "length^" in text
    outcome = mfuser("ablate", "a", "--device", "cpu", "--set", "x=1")
    assert outcome.code == 2 and "settings" in outcome.err


def test_jobs_carry_what_the_command_was_given(tmp_path: Path) -> None:
    inputs = Inputs(("a.toml",), ("p.py",), ("gta=/x",), "cpu")
    request = inputs.request("train", run={})
    assert request["registries"] == ["a.toml"] and request["plugins"] == ["p.py"]
    assert request["data_roots"] == ["gta=/x"] and request["device"] == "cpu"
