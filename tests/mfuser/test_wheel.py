"""The built wheel, installed beside nothing of the checkout, works from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatchling")

pytestmark = pytest.mark.slow


def call(*command: object, cwd: Path) -> str:
    keep = {"PATH", "HOME", "LANG", "TMPDIR"}
    environment = {k: v for k, v in os.environ.items() if k in keep} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", out, root]
    call(sys.executable, *command, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_everything_is_inside(root: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "mfuser/registry.toml" in names
    for package, folder in (
        ("mfuser", "mfuser"),
        ("mfuser_plugins", "plugins/mfuser_plugins"),
        ("mfuser_kernels", "kernels/mfuser_kernels"),
    ):
        for path in (root / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(root / folder).as_posix()}" in names
        assert f"{package}/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "plugins/", "kernels/", "docs/"))]


def test_it_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        call(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
        ).strip()
    )
    pip = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    call(sys.executable, *pip, cwd=tmp_path)
    # The dependencies of this environment, after the new one's own packages; an editable install
    # works by a .pth file, which is not followed from here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    where = call(python, "-c", "import mfuser; print(mfuser.__file__)", cwd=empty).strip()
    assert Path(where).is_relative_to(site)
    program = tmp_path / "venv" / "bin" / "mfuser"
    shown = json.loads(call(program, "list", "--json", cwd=empty))
    assert "demo" in {p["name"] for p in shown["pairings"]} and not any(
        "broken" in p for p in shown["plugins"]
    )
    assert all(Path(p["where"]).is_relative_to(site) for p in shown["pairings"])
    facts = json.loads(call(program, "describe", "demo", "--json", cwd=empty))
    assert facts["trained"] > 100_000
    assert list(empty.iterdir()) == []
