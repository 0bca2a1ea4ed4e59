"""Users without a home folder, and caches that cannot be written."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Any

import pytest

from mfuser import Registry
from mfuser.engine.train import train


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "MFUSER_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_trains(
    tiny: Registry, begin: Any, tmp_path: Path, homeless: None, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, begin("plain", "rare_classes={min_pixels=50}"), tmp_path / "r")
    said = capsys.readouterr().err
    assert said.count("MFUSER_CACHE_DIR") == 1
    assert "class counts are not kept for the next run: this user has no home folder" in said


def test_a_cache_that_cannot_be_written_is_one_warning(
    tiny: Registry,
    begin: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MFUSER_CACHE_DIR", str(tmp_path / "file"))
    train(tiny, begin("plain", "rare_classes={min_pixels=50}"), tmp_path / "r")
    said = capsys.readouterr().err
    assert said.count("not kept") == 1 and "a file of that name is there" in said


def test_the_scan_without_a_home(homeless: None) -> None:
    pytest.importorskip("numba")
    from mfuser_kernels.scan.cpu import compiler

    assert compiler.cache_folder() is None
