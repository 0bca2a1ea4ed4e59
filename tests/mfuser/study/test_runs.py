"""Studies end to end: runs in processes of their own, failures told apart, work not done twice."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from mfuser.engine.console import Console
from mfuser.engine.lock import locked
from mfuser.study import runs

STRANGER = '''
import torch
from mfuser import FusionAdapter, FusionSpec, hookimpl


class Swap(FusionAdapter):
    def __init__(self, width, broken):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(width))
        self.broken = broken

    def forward(self, vfm_tokens, vlm_tokens, vfm_grid=None, vlm_grid=None):
        if self.broken:
            raise ValueError("out of ideas")
        return torch.zeros_like(vfm_tokens), vlm_tokens * self.scale


class SwapSpec(FusionSpec, name="swap"):
    """A stranger's fusion."""

    broken: bool = False

    def build(self, vfm, vlm):
        return Swap(vlm.embed_dim, self.broken)


@hookimpl
def mfuser_components():
    return [SwapSpec]
'''

STUDY = """
[study.s]
base    = "plain"
recipe  = "tiny"
recipe_settings = { steps = 2, save_every = 1, test_images = 1 }
axes.fusion = [
  "none",
  { label = "broken", set = { fusion = { name = "swap", broken = true } } },
  { label = "wild", recipe = { lr = 1e30, schedule = "constant" } },
]
"""


@pytest.fixture
def workplace(write_registry, inside: Path) -> Path:  # type: ignore[no-untyped-def]
    (inside / "swap.py").write_text(STRANGER, "utf-8")
    write_registry(STUDY)
    return inside


def test_failures_are_told_apart_and_a_strangers_part_joins(
    workplace: Path, mfuser: Any, forked_runs: Any
) -> None:
    common = ("--plugin", "swap.py", "--device", "cpu")
    outcome = mfuser("ablate", "s", *common, "--json")
    assert outcome.code == 1, outcome.err
    results = json.loads(outcome.out)
    rows = {row["label"]: row for row in results["rows"]}
    assert {label: row["states"]["0"] for label, row in rows.items()} == {
        "none": "finished",
        "broken": "failed",
        "wild": "diverged",
    }
    # What did not end has no figure, least of all zero.
    assert rows["broken"]["scores"] == rows["wild"]["scores"] == {}
    assert rows["none"]["scores"]["toy-night"]["mean"] is not None
    assert "out of ideas" in rows["broken"]["messages"]["0"]
    assert "step" in rows["wild"]["messages"]["0"]
    assert "broken, seed 0 failed" in outcome.err and "wild, seed 0 diverged" in outcome.err

    out = workplace / "studies" / "s"
    markdown = (out / "results.md").read_text("utf-8")
    assert "| wild | 0 of 1, 1 diverged |" in markdown
    table = list(csv.DictReader(io.StringIO((out / "results.csv").read_text("utf-8"))))
    assert [r["mean"] for r in table if r["variant"] == "wild"] == ["", "", ""]

    # One name in the list; what is finished is left as it is.
    model = out / "none" / "seed0" / "model.safetensors"
    before = model.stat().st_mtime_ns
    outcome = mfuser("ablate", "s", *common, "--axis", "fusion=none,swap", "--json")
    assert outcome.code == 0, outcome.err
    rows = {row["label"]: row for row in json.loads(outcome.out)["rows"]}
    assert rows["swap"]["states"]["0"] == rows["none"]["states"]["0"] == "finished"
    assert model.stat().st_mtime_ns == before
    assert "none, seed 0: already finished" in outcome.err

    # A damaged report counts for nothing: the run is finished again, its model stays.
    report = out / "none" / "seed0" / "report.json"
    whole = json.loads(report.read_text("utf-8"))
    report.write_text(report.read_text("utf-8")[:200], "utf-8")
    outcome = mfuser("ablate", "s", *common, "--axis", "fusion=none", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(report.read_text("utf-8"))["domains"] == whole["domains"]
    assert model.stat().st_mtime_ns == before

    # The same folder with another recipe is another study.
    outcome = mfuser("ablate", "s", *common, "--set-recipe", "lr=5e-4")
    assert outcome.code == 2 and "recipe.lr is 0.001, not 0.0005" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_dry_run_lists_and_touches_nothing(workplace: Path, mfuser) -> None:  # type: ignore[no-untyped-def]
    outcome = mfuser("ablate", "s", "--plugin", "swap.py", "--dry-run", "--seeds", "0,1", "--json")
    assert outcome.code == 0
    listed = json.loads(outcome.out)
    assert [entry["run"] for entry in listed] == [
        f"{label}, seed {seed}" for seed in (0, 1) for label in ("none", "broken", "wild")
    ]
    assert {entry["state"] for entry in listed} == {"open"}
    outcome = mfuser("ablate", "s", "--plugin", "swap.py", "--dry-run", "--index", 1, "--of", 2)
    assert outcome.out.splitlines()[-1].startswith("1 runs")
    assert not (workplace / "studies").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("t",), "no study is called 't'"),
        (("s",), "no fusion component is called 'swap'"),
        (("s", "--axis", "fusion"), "--axis fusion"),
        (("s", "--axis", "fusion=none", "--index", "1"), "from 0 to 0"),
        (("s", "--axis", "fusion=none", "--targets", "cityscapes"), "--data-root cityscapes"),
        (("s", "--axis", "fusion=none", "--out", "other"), "holds no study"),
    ],
)
def test_bad_input_ends_in_one_sentence(workplace: Path, mfuser, arguments, words: str) -> None:  # type: ignore[no-untyped-def]
    (workplace / "other").mkdir()
    (workplace / "other" / "file").touch()
    outcome = mfuser("ablate", *arguments)
    assert outcome.code == 2
    assert words in outcome.err and len(outcome.err.strip().splitlines()) == 1
    assert not (workplace / "studies").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_saves_and_says_how_to_go_on(workplace: Path, forked_runs: Any) -> None:
    command = [sys.executable, "-m", "mfuser", "ablate", "s", "--axis", "fusion=none"]
    command += ["--set-recipe", "steps=100000", "--device", "cpu"]
    process = Forked(command, stderr=subprocess.PIPE, start_new_session=True)
    folder = workplace / "studies" / "s" / "none" / "seed0"
    deadline = time.monotonic() + 120
    while not (folder / "last.safetensors").is_file():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "saved" in said and "the same command goes on" in said
    assert "mfuser ablate s --axis fusion=none" in said
    assert json.loads(folder.with_name("seed0.json").read_text("utf-8"))["status"] == "interrupted"


def test_a_run_taken_by_another_process_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = runs.Job("x", tmp_path / "v" / "seed0", (tmp_path / "never",), {})
    job.folder.parent.mkdir()
    said: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr(runs, "_run", lambda job: pytest.fail("it was started"))
    with locked(job.lock, "x"):
        assert runs.work_through([job], console) == []
    assert re.fullmatch(
        rf"\[1/1\] x is in use by process {os.getpid()} on .*; wait for it or end it", said[0]
    )
