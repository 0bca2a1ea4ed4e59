"""Studies on engines of others: submitit's local executor, and a Ray cluster on this machine."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

WAITS = '''
import os, time
from pathlib import Path
import torch
from mfuser import FusionAdapter, FusionSpec, hookimpl


class Waits(FusionAdapter):
    """Trains only once the file `go` is there; until then it says who is waiting."""

    def __init__(self, width):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(width))

    def forward(self, vfm_tokens, vlm_tokens, vfm_grid=None, vlm_grid=None):
        if self.training and not Path("go").exists():
            Path("waiting.part").write_text(str(os.getpid()))
            Path("waiting.part").replace("waiting")
            while not Path("go").exists():
                time.sleep(0.05)
        return torch.zeros_like(vfm_tokens), vlm_tokens * self.scale


class WaitsSpec(FusionSpec, name="waits"):
    """A fusion that waits."""

    def build(self, vfm, vlm):
        return Waits(vlm.embed_dim)


@hookimpl
def mfuser_components():
    return [WaitsSpec]
'''

STUDY = """
[study.s]
base    = "plain"
recipe  = "tiny"
recipe_settings = { steps = 2, save_every = 1, test_images = 1 }
axes.fusion = ["waits", { label = "wild", recipe = { lr = 1e30, schedule = "constant" } }]
"""


@pytest.fixture
def workplace(write_registry: Callable, inside: Path) -> Path:
    (inside / "waits.py").write_text(WAITS, "utf-8")
    write_registry(STUDY)
    return inside


def when_waiting(workplace: Path, then: Callable[[int], None]) -> threading.Thread:
    """Call `then` with the process that waits in a forward pass, once there is one."""

    def watch() -> None:
        until = time.monotonic() + 240
        while not (workplace / "waiting").exists() and time.monotonic() < until:
            time.sleep(0.1)
        then(int((workplace / "waiting").read_text()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def states(out: str) -> dict[str, str]:
    return {row["label"]: row["states"]["0"] for row in json.loads(out)["rows"]}


@pytest.mark.long
def test_submitit_runs_all_and_is_interrupted_and_goes_on(workplace: Path, mfuser) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("submitit")
    command = ("ablate", "s", "--plugin", "waits.py", "--device", "cpu", "--launcher", "submitit",
               "--launcher-set", "cluster=local", "--axis", "fusion=waits")  # fmt: skip

    def interrupt(pid: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)
        (workplace / "go").touch()  # the step that it is in may end

    watcher = when_waiting(workplace, interrupt)
    ran = mfuser(*command)
    watcher.join()
    assert ran.code == 130, ran.err
    assert "waits, seed 0: running on " in ran.err and "runs were ended" in ran.err
    record = json.loads((workplace / "studies" / "s" / "waits" / "seed0.json").read_text("utf-8"))
    assert record == {"status": "interrupted", "message": "after step 1, saved"}

    ran = mfuser(*command, "--json")
    assert ran.code == 0, ran.err
    assert states(ran.out) == {"waits": "finished"}
    assert "handed to submitit as job " in ran.err and "waits, seed 0: finished" in ran.err


@pytest.mark.long
def test_a_killed_worker_of_ray_costs_no_run(workplace: Path, mfuser) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("ray")

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        (workplace / "go").touch()

    watcher = when_waiting(workplace, kill)
    ran = mfuser("ablate", "s", "--plugin", "waits.py", "--device", "cpu", "--launcher", "ray",
                 "--launcher-set", "workers=2", "--json")  # fmt: skip
    watcher.join()
    assert ran.code == 1, ran.err
    assert states(ran.out) == {"waits": "finished", "wild": "diverged"}
    assert "wild, seed 0: diverged: " in ran.err
    assert "waits, seed 0: lost (" in ran.err and "handed out again as task " in ran.err


def test_a_slurm_job_whose_time_is_up_saves_and_queues_again() -> None:
    """The call of submitit in the job: its process is asked to end, and the order goes back."""
    submitit = pytest.importorskip("submitit")
    from mfuser.study.launchers.slurm import Work

    work = Work({"label": "x"})
    with subprocess.Popen(["sleep", "60"]) as process:
        work.process = process
        again = work.checkpoint()
    assert process.returncode == -signal.SIGINT
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    queued = pickle.loads(pickle.dumps(again.function))
    assert queued.order == work.order and queued.process is None
    assert again.function.checkpoint().function.order == work.order  # it had ended by itself


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--launcher", "submitit"), "there is no SLURM here"),
        (("--launcher", "submitit", "--launcher-set", "cluster=local", "--launcher-set", "gpu=1"),
         "gpu"),
        (("--launcher", "ray", "--launcher-set", "gpu=1"), "did you mean 'gpus'?"),
        (("--launcher-set", "gpus=1"), "--launcher-set goes with --launcher"),
        (("--launcher", "ray", "--of", "2"), "leave out --index and --of"),
    ],
)  # fmt: skip
def test_what_a_launcher_cannot_take_is_refused(
    workplace: Path,
    mfuser,  # type: ignore[no-untyped-def]
    options: tuple[str, ...],
    said: str,
) -> None:
    if "submitit" in options:
        pytest.importorskip("submitit")
    ran = mfuser("ablate", "s", "--plugin", "waits.py", *options)
    assert ran.code == 2 and said in ran.err, ran.err
    assert "Traceback" not in ran.err


def test_a_missing_package_is_named(
    workplace: Path,
    mfuser,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    for name, extra in (("submitit", "slurm"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, name, None)
        ran = mfuser("ablate", "s", "--plugin", "waits.py", "--launcher", name)
        assert ran.code == 2 and f'pip install "mfuser[{extra}]"' in ran.err, ran.err
