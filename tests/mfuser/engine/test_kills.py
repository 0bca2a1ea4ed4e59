"""The short version of tests/helpers/killing.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from killing import Killing

from mfuser import Registry
from mfuser.engine.folder import RUN
from mfuser.engine.train import train


@pytest.mark.slow
def test_random_kills_of_each_command(write_registry: Any, inside: Path) -> None:
    tally = Killing(write_registry(), inside / "work", each=2).until(6, 60)
    assert tally.lost == tally.wrong == [], str(tally)
    assert tally.kills.total() >= 3  # on a busy machine the time may be up first


def test_killed_before_anything_is_written(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is there, and half of run.json under another name: it can begin again."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # as nothing tidies up after SIGKILL
        with pytest.raises(KeyboardInterrupt):
            train(tiny, begin(), folder)
    left = {p.name for p in folder.iterdir()}
    assert RUN not in left and any(name.endswith(".tmp") for name in left)
    train(tiny, begin(), folder)
    assert not list(folder.glob(".*.tmp"))
