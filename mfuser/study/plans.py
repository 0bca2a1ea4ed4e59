"""A study as the commands work through it: its jobs, and the table of what they found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mfuser.config.registry import Registry
from mfuser.config.study import AdapterStudySpec, StudySpec
from mfuser.study import adapters, grid, report, runs
from mfuser.study.results import AnyResults
from mfuser.study.reuse import Neighbors
from mfuser.study.runs import Inputs, Job


class Plan:
    """neighbors: whose runs it may take."""

    jobs: list[Job]
    folder: Path
    identities: dict[str, dict[str, Any]]
    neighbors: Neighbors | None = None

    def check(self) -> None:
        """Raises MFuserError for what matters only if something is to run."""

    def results(self) -> AnyResults:
        """The table of what its runs have found so far."""
        raise NotImplementedError


class TrainingPlan(Plan):
    """A study that trains. reuse: whether it may take a finished run from a study beside it."""

    def __init__(
        self,
        registry: Registry,
        name: str,
        spec: StudySpec,
        folder: Path,
        inputs: Inputs,
        reuse: bool = True,
    ) -> None:
        self.registry, self.name, self.spec, self.folder = registry, name, spec, folder
        self.variants = grid.variants(registry, name, spec)
        self.jobs = runs.training_jobs(self.variants, folder, inputs)
        self.identities = {v.slug: v.identity() for v in self.variants}
        self.neighbors = Neighbors(folder, registry, inputs.device) if reuse else None

    def check(self) -> None:
        runs.check_runs(self.registry, self.variants, self.folder)
        if any(job.state()[0] != "finished" for job in self.jobs):
            grid.check_data(self.registry, self.variants)

    def results(self) -> AnyResults:
        return report.collect(self.registry, self.name, self.spec, self.variants, self.jobs)


class AdapterPlan(Plan):
    """A study that measures what fusion adapters cost."""

    def __init__(
        self, registry: Registry, name: str, spec: AdapterStudySpec, folder: Path, inputs: Inputs
    ) -> None:
        self.registry, self.name, self.spec, self.folder = registry, name, spec, folder
        self.adapters = adapters.adapters(registry, name, spec)
        self.jobs = adapters.jobs(self.adapters, spec, folder, inputs)
        self.identities = adapters.identities(self.adapters, spec)

    def results(self) -> AnyResults:
        return adapters.collect(self.registry, self.name, self.spec, self.adapters, self.jobs)
