"""The packages of strangers under examples/: installed and tested as a stranger would."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = {
    "mfuser-dino": ("vision", "dino"),
    "mfuser-bottleneck": ("fusion", "bottleneck"),
    "mfuser-kitti": ("dataset", "kitti"),
}


# As pip and a build front end do it, but in one process: they start three for each package.
BUILT_AND_INSTALLED = """
import json, os, runpy, sys
from importlib import import_module
try:
    import tomllib
except ImportError:
    import tomli as tomllib
pip, wheels, *folders = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    with open("pyproject.toml", "rb") as file:
        backend = import_module(tomllib.load(file)["build-system"]["build-backend"])
    backend.build_wheel(wheels)
sys.argv = ["pip", *json.loads(pip), *(os.path.join(wheels, name) for name in os.listdir(wheels))]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three packages, built as wheels and installed into an empty folder."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the packages, is missing")
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    folders = [str(root / "examples" / name) for name in EXAMPLES]
    pip = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    pip += ["--target", str(target)]
    ran = subprocess.run(
        [sys.executable, "-c", BUILT_AND_INSTALLED, json.dumps(pip), str(wheels), *folders],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return target


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=site, env=env, capture_output=True, text=True
    )


COMMANDS = {
    "list": ["list"],
    # Its entry point's name is all a user knows of it.
    "check": ["plugin", "check", "kitti"],
    # A backbone and an adapter that have never met, in the demo pairing.
    "describe": [
        *("describe", "demo", "--set", "fusion={name='bottleneck', tokens=2}"),
        *("--set", "vfm={name='dino', weights='random', width=64, depth=2}"),
    ],
}
ONE_AFTER_THE_OTHER = """
import json, sys
from mfuser.cli import main
for command in json.loads(sys.argv[1]):
    try:
        main([*command, "--json"])
    except SystemExit as stop:
        print(f"--- {stop.code}", flush=True)
import pytest
print(f"--- {int(pytest.main(sys.argv[2:]))}")
"""


@pytest.fixture(scope="module")
def said(root: Path, installed: Path) -> dict[str, tuple[int, str]]:
    """Exit code and output of the commands, and of the packages' own tests under "test", in one
    process where the packages are installed."""
    tests = [str(root / "examples" / package / "tests") for package in EXAMPLES]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull]
    # The suite in full is what `mfuser plugin check` runs; here, what the packages add to it.
    options += ["-k", "not conforms"]
    commands = json.dumps(list(COMMANDS.values()))
    ran = run(installed, "-c", ONE_AFTER_THE_OTHER, commands, *options, *tests)
    parts = re.split(r"^--- (\d+)$", ran.stdout, flags=re.M)
    names = [*COMMANDS, "test"]
    assert len(parts) == 2 * len(names) + 1, ran.stderr
    return {
        name: (int(code), text)
        for name, text, code in zip(names, parts[0::2], parts[1::2], strict=False)
    }


def test_installed_packages_are_found(said: dict[str, tuple[int, str]]) -> None:
    code, text = said["list"]
    assert code == 0, text
    listed = json.loads(text)
    for kind, name in EXAMPLES.values():
        assert name in [c["name"] for c in listed[kind]]
    assert not any("broken" in p for p in listed["plugins"])


def test_a_check_takes_less_than_a_minute(said: dict[str, tuple[int, str]]) -> None:
    code, text = said["check"]
    assert code == 0, text
    assert json.loads(text)["seconds"] < 60


def test_a_pairing_of_two_strangers(said: dict[str, tuple[int, str]]) -> None:
    code, text = said["describe"]
    assert code == 0, text
    shown = json.loads(text)
    parts = {p["part"]: p for p in shown["parts"]}
    assert parts["fusion"]["component"] == "bottleneck" and parts["fusion"]["trained"] > 0
    assert parts["vfm"]["component"] == "dino" and parts["vfm"]["trained"] == 0


def test_their_own_tests_pass(said: dict[str, tuple[int, str]]) -> None:
    code, text = said["test"]
    assert code == 0 and "7 passed" in text, text


@pytest.mark.parametrize("package", EXAMPLES)
def test_it_conforms(package: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfuser.testing import check_plugin

    monkeypatch.syspath_prepend(str(root / "examples" / package))
    module = package.replace("-", "_")
    (report,) = check_plugin(module, pairings=3)
    assert (report.kind, report.name) == EXAMPLES[package]
    assert report.passed, report


def code_lines(path: Path, without: set[str]) -> int:
    """Lines of code, without blank ones, comments, docstrings and the classes named."""
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in without:
            left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for n, line in lines if n not in left_out and line.split("#")[0].strip())


def test_what_mfuser_asks_for_is_short(root: Path) -> None:
    """Beside its mathematics a fusion adapter takes 40 lines, and a vision transformer 60."""
    bottleneck = root / "examples" / "mfuser-bottleneck" / "mfuser_bottleneck.py"
    assert code_lines(bottleneck, {"Bottleneck"}) <= 40
    dino = root / "examples" / "mfuser-dino" / "mfuser_dino.py"
    assert code_lines(dino, {"Block"}) <= 60


def test_the_mathematics_names_nothing_of_mfuser(root: Path) -> None:
    source = (root / "examples" / "mfuser-bottleneck" / "mfuser_bottleneck.py").read_text("utf-8")
    (maths,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "Bottleneck"]
    names = {n.id for n in ast.walk(maths) if isinstance(n, ast.Name)}
    assert not names & {"FusionAdapter", "FusionSpec", "TokenShape", "hookimpl"}
