"""Table 3 of the paper, counted; and the benchmark that measures it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mfuser import TokenShape, components
from mfuser.reporting.adapter_cost import AdapterCost, Growth, Seconds


@pytest.fixture(scope="module")
def benchmark_script() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks/adapters.py"
    found = importlib.util.spec_from_file_location("adapters_benchmark", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "millions", "gflops"),
    [
        ("self_attention_concat", 4.20, 98.64),
        ("self_attention_separate", 8.40, 71.08),
        ("bi_deformable_attention", 3.35, 34.65),
        ("mvfuser", 1.67, 17.21),
    ],
)
def test_table_3(name: str, millions: float, gflops: float) -> None:
    """2 x multiply-adds, and 1 for each SiLU, as the paper's profiler counts (without: 17.20)."""
    shape = TokenShape(1024, (36, 36), 1)
    with torch.device("meta"):
        adapter = components("fusion")[name]().build(shape, shape).eval()  # type: ignore[attr-defined]
        tokens = torch.empty(2, 1297, 1024)
        silu = {torch.ops.aten.silu: lambda shape, **_: torch.Size(shape).numel()}
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=silu) as counter:
            adapter(tokens, tokens, shape.grid, shape.grid)
    by_operator = counter.get_flop_counts()["Global"].items()
    counted = sum(flops for op, flops in by_operator if str(op).startswith("aten."))
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 2) == millions
    assert round(counted / 1e9, 2) == gflops


def test_benchmark_measures_and_writes(
    benchmark_script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "costs.json"
    names = ["mvfuser", "self_attention_concat", "convolution"]
    kept = benchmark_script.main(
        ["--adapters", *names, "--curve", "16", "64", "--width", "16", "--grid", "4"]
        + ["--json", str(out)]
    )
    results = json.loads(out.read_text())
    assert [c["adapter"] for c in results["costs"]] == names
    assert all([p["tokens"] for p in g["points"]] == [32, 128] for g in results["growth"])
    assert results["promises"] == kept and len(kept) == 2
    printed = capsys.readouterr().out
    assert "| convolution |" in printed and "time ~ length^" in printed


def test_promises_can_fail(benchmark_script: ModuleType) -> None:
    def cost(name: str, tokens: int, seconds: float, params: int = 0) -> AdapterCost:
        taken = Seconds(p20=seconds, p50=seconds, p80=seconds)
        return AdapterCost(
            adapter=name,
            batch=2,
            tokens=tokens,
            params=params,
            flops=0,
            scan_flops=0,
            forward=taken,
        )

    def grown(name: str, *seconds: float) -> Growth:
        points = [cost(name, n, s) for n, s in zip((512, 4096, 8192), seconds, strict=True)]
        return Growth(adapter=name, points=points, exponent=1.0, fitted=3)

    costs = [cost("mvfuser", 2594, 2.594), cost("self_attention_concat", 2594, 3.0)]
    ours, theirs = grown("mvfuser", 9.0, 4.1, 8.2), grown("self_attention_concat", 0.1, 9.0, 20.0)
    kept = benchmark_script.promises(costs, [ours, theirs])
    # Sizes are wrong; shorter sequences are not asked about.
    assert list(kept.values()) == [False, False, True, True]
    slow = grown("mvfuser", 9.0, 4.1, 25.0)
    assert list(benchmark_script.promises(costs, [slow, theirs]).values())[2:] == [False, False]


def test_unknown_adapters_are_named(benchmark_script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="'mvfuserr'; available: .*mvfuser"):
        benchmark_script.main(["--adapters", "mvfuserr"])
