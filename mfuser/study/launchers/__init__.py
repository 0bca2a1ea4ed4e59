"""Engines of others that a study's runs can be handed to: `mfuser ablate --launcher NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfuser.study.launchers.base import Handle as Handle
from mfuser.study.launchers.base import Launcher as Launcher

NAMES = ("local", "submitit", "ray")
"""local: one run after the other, on this machine, without an engine."""


def open_launcher(name: str, options: Mapping[str, Any], folder: Path) -> Launcher:
    """An engine, ready to take runs. folder: where it may keep its own files.

    Raises MissingExtraError where its package is not installed, MFuserError for an option that it
    does not have or an engine that cannot be reached.
    """
    if name == "submitit":
        from mfuser.study.launchers.slurm import Submitit

        return Submitit(options, folder)
    from mfuser.study.launchers.ray import Ray

    return Ray(options)
