"""One run of a study in a process of its own: a job on standard input, the outcome in a file.

A fresh process per run: memory, threads and Accelerate's state are clean, and a run that the
system kills affects no other.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from mfuser.config.registry import Registry, load_registry
from mfuser.config.run import RunSpec
from mfuser.engine.folder import RUN
from mfuser.engine.lock import InUse, locked
from mfuser.engine.signals import INTERRUPTED, ending
from mfuser.errors import MFuserError
from mfuser.files import write_json
from mfuser.study import reuse
from mfuser.study.adapters import work as measure_adapter
from mfuser.study.runs import BUSY


def train(job: dict[str, Any], registry: Registry) -> None:
    """Train, or continue, then evaluate: afterwards the folder holds a model and a report."""
    from mfuser.engine.run import train as train_run

    run, folder = RunSpec.read(registry, job["run"], "the study's run"), Path(job["folder"])
    resume = (folder / RUN).is_file()
    reuse.sign(folder, reuse.makers(registry, run, job["device"]))
    train_run(run, folder, registry=registry, resume=resume, device=job["device"])


def main() -> int:
    with ending():
        return carry_out(json.load(sys.stdin))


def carry_out(job: dict[str, Any]) -> int:
    """A job's order (`runs.Job.order`) in this process; returns the exit code."""
    os.chdir(job["cwd"])
    try:
        with locked(Path(job["lock"]), job["label"]):
            return work(job, Path(job["outcome"]))
    except InUse:
        return BUSY


def work(job: dict[str, Any], outcome: Path) -> int:
    """Returns the exit code."""
    outcome.unlink(missing_ok=True)
    from mfuser.engine.train import Diverged, Interrupted

    try:
        registry = load_registry(
            *job["registries"], plugins=job["plugins"], data_roots=job["data_roots"]
        )
        if job["work"] == "train":
            train(job, registry)
        else:
            measure_adapter(job, registry)
    except (Interrupted, KeyboardInterrupt) as stop:
        step = getattr(stop, "step", None)
        message = f"after step {step}, saved" if step else "before anything was saved"
        write_json(outcome, {"status": "interrupted", "message": message})
        return INTERRUPTED
    except Diverged as error:
        write_json(outcome, {"status": "diverged", "message": str(error)})
        return 2
    except MFuserError as error:
        write_json(outcome, {"status": "failed", "message": str(error)})
        return 2
    except Exception as error:
        log = outcome.with_suffix(".log")
        log.write_text(traceback.format_exc(), "utf-8")
        message = f"{type(error).__name__}: {error} (see {log})"
        write_json(outcome, {"status": "failed", "message": message})
        return 1
    outcome.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
