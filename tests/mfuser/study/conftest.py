"""Runs of studies in forked processes: a fresh one imports torch for seconds.

Fresh ones run in test_report.py (an adapter's costs) and test_launchers.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from forked import Forked

from mfuser.study import runs


@pytest.fixture
def forked_runs() -> Iterator[pytest.MonkeyPatch]:
    """The processes that a study starts are forked from this one."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})
        patch.setattr(runs, "subprocess", stand_in)
        yield patch
