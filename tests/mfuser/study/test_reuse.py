"""Runs that studies have in common are trained once, and nothing else is taken for the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from mfuser.config.registry import load_registry
from mfuser.engine.console import Console
from mfuser.engine.lock import locked
from mfuser.study import reuse, runs

STUDIES = """
[study.s]
base    = "plain"
recipe  = "tiny"
recipe_settings = { steps = 1, warmup = 0, save_every = 1, test_images = 1 }
axes.fusion = ["none"]

[study.t]
base    = "tiny"
recipe  = "tiny"
recipe_settings = { steps = 1, warmup = 0, save_every = 1, test_images = 1 }
axes.parts = [
  { label = "plainest", set = { fusion = "none", enhancer = "none", decoder = "linear" } },
  { label = "plainest again", pairing = "plain" },
]
"""


def test_a_run_of_two_studies_is_trained_once(
    write_registry: Any, inside: Path, mfuser: Any, forked_runs: Any
) -> None:
    write_registry(STUDIES)
    listed = mfuser("ablate", "s", "t", "--dry-run", "--device", "cpu")
    assert listed.out.splitlines()[-1] == (
        "3 runs in studies/s, studies/t, 3 to do, of which 1 differ"
    )
    assert not (inside / "studies").exists()

    ran = mfuser("ablate", "s", "t", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    s, t = json.loads(ran.out)
    origin = "s/none/seed0"
    assert "taken" not in s["rows"][0] or s["rows"][0]["taken"] == {}
    assert [row["taken"] for row in t["rows"]] == [{"0": origin}, {"0": origin}]
    assert [row["scores"] for row in t["rows"]] == [s["rows"][0]["scores"]] * 2
    assert f"plainest, seed 0: the same run as {origin}, taken from there" in ran.err
    folder = inside / "studies"
    assert f"trained once: plainest ({origin}); plainest again ({origin})." in (
        folder / "t" / "results.md"
    ).read_text("utf-8")
    model = (folder / origin / "model.safetensors").read_bytes()
    for label in ("plainest", "plainest-again"):
        taken = folder / "t" / label / "seed0"
        assert (taken / "model.safetensors").read_bytes() == model
        assert (taken / "pictures").is_dir() and not list(taken.glob(".lock*"))

    # A study by itself, in a folder beside them: the runs stand there to be taken.
    options = ("--out", folder / "u", "--device", "cpu", "--dry-run")
    assert json.loads(mfuser("ablate", "t", *options, "--json").out)[0]["elsewhere"] == origin
    assert mfuser("ablate", "t", *options).out.splitlines()[-1].endswith("2 runs in "
        f"{folder / 'u'}, 0 to do")  # fmt: skip
    fresh = mfuser("ablate", "t", *options, "--no-reuse").out.splitlines()[-1]
    assert fresh.endswith(", 2 to do")
    other = mfuser("ablate", "t", *options, "--set-recipe", "lr=5e-4").out.splitlines()[-1]
    assert other.endswith(", 2 to do, of which 1 differ")


@pytest.fixture
def beside(write_registry: Any, inside: Path, begin: Any) -> tuple[runs.Job, Path, reuse.Neighbors]:
    """A job, the folder of the same run in the study beside, which is finished, and its view."""
    registry = load_registry(write_registry())
    run = begin()
    request = {"run": run.model_dump(mode="json")}
    folder = inside / "other" / "same" / "seed0"
    folder.mkdir(parents=True)
    (inside / "other" / runs.STUDY).write_text("{}", "utf-8")
    found = {"most_frequent": "road", "precision": "float32 by TF32"}  # when it began, on a GPU
    begun = {**request["run"], "pairing_name": "other: same", **found}
    (folder / "run.json").write_text(json.dumps(begun), "utf-8")
    (folder / "model.safetensors").touch()
    report = {"protocol": {}, "notes": [], "average": 0.5, "domains": {}}
    (folder / "report.json").write_text(json.dumps(report), "utf-8")
    reuse.sign(folder, reuse.makers(registry, run, "cpu"))
    job = runs.training_job("mine", inside / "one" / "mine" / "seed0", request)
    return job, folder, reuse.Neighbors(inside / "one", registry, "cpu")


def test_what_is_the_same_is_taken(beside: Any, inside: Path) -> None:
    job, folder, neighbors = beside
    assert neighbors.finished(job) == folder
    assert neighbors.take(job) == "other/same/seed0" == reuse.taken_from(job.folder)
    assert job.state() == ("finished", "")
    # Taken from where it was taken to, it is still that of the first study.
    shutil.rmtree(inside / "other")
    (inside / "one" / runs.STUDY).write_text("{}", "utf-8")
    second = runs.training_job("yours", inside / "two" / "yours" / "seed0", job.request)
    assert neighbors.take(second) == "other/same/seed0"
    assert neighbors.take(second) is None  # it is there


def _recipe(job: runs.Job, folder: Path) -> None:
    job.request["run"]["recipe"]["lr"] = 5e-4


def _seed(job: runs.Job, folder: Path) -> None:
    job.request["run"]["seed"] = 1


def _targets(job: runs.Job, folder: Path) -> None:
    job.request["run"]["targets"].pop()


def _unsigned(job: runs.Job, folder: Path) -> None:
    reuse.record(folder).unlink()


def _unfinished(job: runs.Job, folder: Path) -> None:
    (folder / "report.json").write_text("{", "utf-8")


def _several(job: runs.Job, folder: Path) -> None:
    """Begun by another program, and finished by this one."""
    made = json.loads(reuse.record(folder).read_text("utf-8"))
    reuse.record(folder).write_text(json.dumps(made | {"code": "older"}), "utf-8")
    (folder / "last.safetensors").touch()
    reuse.sign(folder, made)


def _begun(job: runs.Job, folder: Path) -> None:
    job.folder.mkdir(parents=True)


@pytest.mark.parametrize(
    "change", [_recipe, _seed, _targets, _unsigned, _unfinished, _several, _begun]
)
def test_another_run_is_not_taken(beside: Any, change: Any) -> None:
    job, folder, neighbors = beside
    change(job, folder)
    assert neighbors.take(job) is None and reuse.taken_from(job.folder) is None


@pytest.mark.parametrize("what", ["code", "threads", "variable", "library", "root", "device"])
def test_a_run_made_by_something_else_is_not_taken(
    beside: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _, neighbors = beside
    if what == "code":
        monkeypatch.setattr(reuse, "_code", lambda modules: "newer")
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    elif what == "variable":
        monkeypatch.setenv("MFUSER_SCAN_BACKEND", "chunked")
    elif what == "library":
        monkeypatch.setattr(reuse, "_version", lambda library: "9")
    elif what == "device":
        neighbors.device = "mps"
    else:
        monkeypatch.setattr(neighbors.registry, "root", lambda name: Path("/elsewhere"))
    assert neighbors.finished(job) is None


def test_the_code_of_a_plugin_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a_strangers_part.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for text in ("x = 1", "x = 2", "x = 2"):
        file.write_text(text, "utf-8")
        reuse._code.cache_clear()
        found.append(reuse._code(frozenset({"a_strangers_part"})))
    reuse._code.cache_clear()
    assert found[0] != found[1] == found[2]


def test_weights_in_a_file_count(begin: Any, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"1")
    run = begin()
    vfm = run.pairing.vfm.model_copy(update={"weights": str(weights)})
    run = run.model_copy(update={"pairing": run.pairing.model_copy(update={"vfm": vfm})})
    before = dict(reuse._files(run))
    assert list(before) == [str(weights)]
    weights.write_bytes(b"12")
    assert dict(reuse._files(run)) != before


def test_a_run_that_a_neighbor_trains_is_waited_for(
    beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, folder, neighbors = beside
    report = (folder / "report.json").rename(folder / "later")
    said: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr(runs, "_run", lambda job: pytest.fail("it was trained again"))
    waits: list[float] = []

    def ends(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            report.rename(folder / "report.json")

    monkeypatch.setattr(runs.time, "sleep", ends)
    with locked(runs.training_job("", folder).lock, "other"):
        assert runs.work_through([job], console, neighbors) == []
    assert len(waits) == 2 and len(said) == 2
    assert "the same run is being trained" in said[0] and "taken from there" in said[1]


def test_a_neighbor_on_another_machine_that_has_gone_is_not_waited_for(beside: Any) -> None:
    job, folder, neighbors = beside
    lock = runs.training_job("", folder).lock
    owner = lock.with_name(f"{lock.name}.owner")
    owner.write_text(json.dumps({"pid": 1, "host": "node-7", "since": "then"}), "utf-8")
    with FileLock(lock):
        assert neighbors.at_work(job) == "node-7, process 1"
    assert neighbors.at_work(job) is None


def test_a_run_that_another_process_takes_ends_nothing(
    beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _, neighbors = beside
    said: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr(runs, "_run", lambda job: pytest.fail("it was trained"))
    job.folder.parent.mkdir(parents=True)
    with locked(job.lock, "mine"):
        assert runs.work_through([job], console, neighbors) == []
    assert len(said) == 1 and "[1/1] mine is in use by process" in said[0]


@pytest.mark.parametrize("names", [("s", "nope"), ()])
def test_every_study_must_be_there(
    write_registry: Any, inside: Path, mfuser: Any, names: tuple[str, ...]
) -> None:
    write_registry(STUDIES)
    outcome = mfuser("ablate", *names)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "no study is called 'nope'" in outcome.err or "STUDY..." in outcome.err
