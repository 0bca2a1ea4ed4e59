"""The house: who imports whom, how long files are, and that nothing names one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = ("mfuser", "plugins", "kernels")
MACHINE = re.compile(r"(?<![\w.])/(?:home|work|root|Users|mnt|data)/\w")


def sources(root: Path, *folders: str) -> list[Path]:
    return [p for f in folders for p in sorted((root / f).rglob("*.py"))]


def test_imports_point_one_way(root: Path) -> None:
    pytest.importorskip("importlinter")
    # A process of its own: it sets up logging, which switches our logger off.
    code = (
        "import sys; from importlinter.cli import lint_imports; "
        "sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True))"
    )
    command = [sys.executable, "-c", code, str(root / "pyproject.toml")]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_framework_names_no_plugin(root: Path) -> None:
    """Not even in an import inside a function, which import-linter follows, or in a string."""
    for path in sources(root, "mfuser"):
        text = path.read_text("utf-8")
        assert not re.search(r"import_module\(.*mfuser_plugins", text), path
        assert not re.search(r"^\s*(from|import) mfuser_(plugins|kernels)", text, re.M), path


def test_files_are_short(root: Path) -> None:
    long = {
        str(p.relative_to(root)): count
        for p in sources(root, *SOURCES, "tests", "benchmarks", "examples")
        if (count := len(p.read_text("utf-8").splitlines())) > 400
    }
    assert not long


def test_sections_of_the_paper_are_cited_right(root: Path) -> None:
    """4.1 is MVFuser, 4.2 MTEnhancer and the losses, 5.1 settings, 5.2 and 5.3 results."""
    subject = {"4.1": ("mvfuser", "encoder"), "4.2": ("enhancer", "alignment", "reading"),
               "5.1": ("",), "5.2": ("",), "5.3": ("",)}  # fmt: skip
    cited = re.compile(
        r"(?:paper[ ,(]+|CVPR 2025, )section (\d(?:\.\d)?)|^# Section (\d\.\d) and the rel", re.M
    )
    files = [*sources(root, *SOURCES), *(root / "docs").glob("*.md"), *root.glob("*.toml"),
             *(root / "mfuser").rglob("*.toml")]  # fmt: skip
    found = [
        (path, match[1] or match[2])
        for path in files
        for match in cited.finditer(path.read_text("utf-8"))
    ]
    assert len(found) > 8
    for path, section in found:
        assert any(part in str(path).lower() for part in subject.get(section, ())), (path, section)


def test_no_file_names_one_machine(root: Path) -> None:
    files = [
        *sources(root, *SOURCES, "tests", "benchmarks"),
        *root.glob("*.toml"),
        *root.glob("*.md"),
        *(root / "docs").rglob("*.md"),
        root / "Makefile",
    ]
    named = {
        str(p.relative_to(root)): m[0]
        for p in files
        if p != Path(__file__) and (m := MACHINE.search(p.read_text("utf-8")))
    }
    assert not named


def test_plugins_import_nothing_heavy_and_change_nothing() -> None:
    """`mfuser list` imports every plugin: the libraries wait until a model is built."""
    code = (
        "import sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "from mfuser.plugins.discovery import load_components\n"
        "found = load_components()\n"
        "assert not found.broken, found.broken\n"
        "assert len(found.loaded) > 20 and not [p for p in found.loaded if p.changed]\n"
        "heavy = {'timm', 'open_clip', 'transformers', 'cv2', 'accelerate', 'triton', 'numba'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_every_package_is_typed(root: Path) -> None:
    for package in ("mfuser", "plugins/mfuser_plugins", "kernels/mfuser_kernels"):
        assert (root / package / "py.typed").is_file(), package


def test_the_citation_is_of_this_version(root: Path) -> None:
    from mfuser import __version__

    stated = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text("utf-8"), re.M)
    assert stated is not None and stated[1] == __version__


def test_released_outputs_stay_small(root: Path) -> None:
    """Every clone carries them for the parity tests."""
    assert sum(p.stat().st_size for p in (root / "tests/golden").iterdir()) < 8.2e6
