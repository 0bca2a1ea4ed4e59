"""The interface of an engine to a study: take a run, tell whether it ended, end it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol


class Handle(Protocol):
    """A run that was handed to an engine. name: the engine's own, e.g. "job 4711"."""

    name: str

    def ended(self) -> str | None:
        """None while it waits or runs; afterwards the fate of its process, in a few words."""

    def cancel(self) -> None:
        """Ask it to end; it saves first where it can."""


class Launcher(ABC):
    """An engine that runs each order of a study in a process of its own, somewhere."""

    name: str

    @abstractmethod
    def submit(self, order: dict[str, Any], label: str) -> Handle:
        """Hand over an order (`runs.Job.order`); returns at once."""

    @abstractmethod
    def close(self) -> None:
        """After the last run ended."""
