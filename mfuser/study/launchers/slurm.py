"""SLURM through submitit: a job for each run, requeued by the scheduler where its time runs out.

Before a job's time is up or it makes room for another one, SLURM sends a signal
(`signal_delay_s` ahead): the run saves, the job goes back into the queue and goes on from there.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfuser.errors import MFuserError, MissingExtraError, suggest
from mfuser.study.launchers.base import Handle, Launcher
from mfuser.study.runs import in_process

OWN = ("cluster", "max_requeues")
MAX_REQUEUES = 1000
LONG = 3 * 24 * 60
"""Minutes that a run may take where `timeout_min` is not given."""


class Work:
    """The work of a job; pickled on the way there."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.process: Any = None

    def __call__(self) -> int:
        def started(process: Any) -> None:
            self.process = process

        code, _ = in_process(self.order, started=started)
        return code

    def checkpoint(self) -> Any:
        """Called by submitit in the job when its time runs out: let the run save, queue again."""
        import submitit

        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Work(self.order))

    def __getstate__(self) -> dict[str, Any]:
        return {"order": self.order, "process": None}


class _Job:
    def __init__(self, job: Any) -> None:
        self.job = job
        self.name = f"job {job.job_id}"

    def ended(self) -> str | None:
        if not self.job.done():
            return None
        try:
            return f"exit code {self.job.result()}"
        except Exception as error:  # whatever submitit makes of a job that was killed
            first = str(error).strip().splitlines()
            return f"state {self.job.state}" + (f" ({first[0]})" if first else "")

    def cancel(self) -> None:
        self.job.cancel(check=False)


class Submitit(Launcher):
    """options: cluster ("slurm", or "local" for processes on this machine; default: what is
    there), max_requeues, and submitit's parameters (timeout_min, gpus_per_node, cpus_per_task,
    mem_gb, slurm_partition, …)."""

    name = "submitit"

    def __init__(self, options: Mapping[str, Any], folder: Path) -> None:
        try:
            import submitit
        except ImportError:
            raise MissingExtraError("submitit", "slurm", "--launcher submitit") from None
        cluster = options.get("cluster")
        more = int(options.get("max_requeues", MAX_REQUEUES))
        parameters = {k: v for k, v in options.items() if k not in OWN}
        try:
            self.executor = submitit.AutoExecutor(
                folder=folder / "submitit", cluster=cluster, slurm_max_num_timeout=more
            )
            if self.executor.cluster == "local" and cluster is None:
                raise MFuserError(
                    "--launcher submitit: there is no SLURM here (no srun); for processes on this "
                    "machine give --launcher-set cluster=local"
                )
            self.executor.update_parameters(timeout_min=parameters.pop("timeout_min", LONG))
            self.executor.update_parameters(**parameters)
        except MFuserError:
            raise
        except Exception as error:
            known = [*OWN, *submitit.AutoExecutor._typed_parameters()]  # no public list
            wrong = next((k for k in parameters if k not in known and "_" not in k), None)
            near = suggest(wrong, known) if wrong else ""
            raise MFuserError(f"--launcher submitit: {_brief(error)}{near}") from error

    def submit(self, order: dict[str, Any], label: str) -> Handle:
        self.executor.update_parameters(name=label.replace(" ", "-").replace(",", "")[:60])
        return _Job(self.executor.submit(Work(order)))

    def close(self) -> None:
        """Jobs outlive this process; there is nothing to close."""


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
