"""A Ray cluster: each run is a task, in a worker process that ends with it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from mfuser.errors import MFuserError, MissingExtraError, suggest
from mfuser.study.launchers.base import Handle, Launcher
from mfuser.study.worker import carry_out

OPTIONS = {
    "address": None,
    "cpus": 1,
    "gpus": 0,
    "workers": None,
}
"""address: of a running cluster ("auto", "ray://HOST:10001"); None starts one on this machine, with
room for `workers` runs at once (default: as many as it has processors). cpus, gpus: that a run
takes."""


class _Task:
    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference
        self.name = f"task {reference.hex()[:8]}"

    def ended(self) -> str | None:
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return f"exit code {self.ray.get(self.reference)}"
        except Exception as error:  # a lost worker or node, a task that was canceled
            return type(error).__name__

    def cancel(self) -> None:
        with contextlib.suppress(Exception):  # it may have ended by itself
            self.ray.cancel(self.reference)


class Ray(Launcher):
    """options: see OPTIONS. A worker or node that is lost loses the steps since its run's last
    checkpoint; the study hands the run out again."""

    name = "ray"

    def __init__(self, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in OPTIONS:
                raise MFuserError(
                    f"--launcher-set {name}: ray takes no such option{suggest(name, OPTIONS)}"
                )
        try:
            import ray
        except ImportError:
            raise MissingExtraError("ray", "ray", "--launcher ray") from None
        chosen: dict[str, Any] = {**OPTIONS, **options}
        start: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if chosen["address"] is not None:
            start["address"] = chosen["address"]
        else:
            start["include_dashboard"] = False
            if chosen["workers"] is not None:
                start["num_cpus"] = chosen["workers"] * chosen["cpus"]
        try:
            ray.init(**start)
        except Exception as error:
            raise MFuserError(
                f"--launcher ray: no cluster could be reached: {' '.join(str(error).split())[:300]}"
            ) from error
        self.ray = ray
        # max_calls: memory, threads and CUDA's state of one run are not the next one's.
        self.task = ray.remote(
            num_cpus=chosen["cpus"], num_gpus=chosen["gpus"], max_calls=1, max_retries=0
        )(carry_out)

    def submit(self, order: dict[str, Any], label: str) -> Handle:
        return _Task(self.ray, self.task.options(name=label).remote(order))

    def close(self) -> None:
        self.ray.shutdown()
