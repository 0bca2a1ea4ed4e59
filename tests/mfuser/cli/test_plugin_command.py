"""`mfuser plugin new` and `mfuser plugin check`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import forked

from mfuser.errors import PluginError
from mfuser.plugins.scaffold import KINDS, write
from mfuser.testing import check_plugin

Run = Callable[..., Any]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Makes a folder's modules importable, and forgets them afterwards."""
    before = set(sys.modules)
    yield lambda folder: monkeypatch.syspath_prepend(str(folder))
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.mark.parametrize("kind", KINDS)
def test_scaffold_works_at_once(
    kind: str, tmp_path: Path, importable: Callable[[Path], None], mfuser: Run
) -> None:
    """The generated package passes its own tests and the conformance suite, unchanged."""
    folder = tmp_path / "package"
    shown = mfuser("plugin", "new", f"my-{kind}", "--kind", kind, "--out", folder, "--json")
    assert shown.code == 0
    files = {Path(f).relative_to(folder).as_posix() for f in json.loads(shown.out)["files"]}
    test = f"tests/test_my_{kind}.py"
    assert files == {"pyproject.toml", "README.md", f"my_{kind}.py", test}
    assert not any("$" in (folder / f).read_text("utf-8") for f in files)
    importable(folder)
    namespace: dict[str, Any] = {}
    exec((folder / test).read_text("utf-8"), namespace)
    for name, function in namespace.items():
        if name.startswith("test_") and name != "test_conforms":
            needs_folder = "tmp_path" in function.__code__.co_varnames
            (tmp_path / name).mkdir()
            function(tmp_path / name) if needs_folder else function()
    (report,) = check_plugin(f"my_{kind}", pairings=2)
    assert report.passed, report


def test_check_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As an author runs it: in the package's folder, before anything is installed."""
    write("my-dataset", "dataset", tmp_path / "package")
    ran = forked(["plugin", "check", "my_dataset", "--json"], tmp_path / "package")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shown = json.loads(ran.stdout)
    assert shown["passed"] and shown["seconds"] < 60
    (component,) = shown["components"]
    assert (component["kind"], component["name"]) == ("dataset", "my_dataset")
    assert {"check", "outcome", "tried", "got", "expected", "fix"} <= set(component["checks"][0])


BROKEN = """
import torch
from mfuser import FusionAdapter, FusionSpec, hookimpl

class Broken(FusionAdapter):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.used = torch.nn.Parameter(torch.zeros(1))

    def forward(self, vfm_tokens, vlm_tokens, vfm_grid=None, vlm_grid=None):
        return self.used * vfm_tokens, self.used * vlm_tokens

class BrokenSpec(FusionSpec, name="my_broken"):
    '''Trains nothing with half of what it has.'''
    def build(self, vfm, vlm):
        return Broken()

@hookimpl
def mfuser_components():
    return [BrokenSpec]
"""


def test_check_of_a_fault_says_what_to_do(tmp_path: Path, mfuser: Run) -> None:
    file = tmp_path / "my_broken.py"
    file.write_text(BROKEN, "utf-8")
    shown = mfuser("plugin", "check", file, "--pairings", 1)
    assert shown.code == 1
    assert "FAIL  gradients" in shown.out
    assert "no gradient reaches 'unused'" in shown.out
    assert "fix       use it in forward(), remove it" in shown.out
    assert "2 failed by 2 faults (my_broken: gradients, my_broken: with" in shown.out


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a module as a plugin, as far as entry points can tell."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda name, text: _offer(tmp_path, name, text)
    sys.modules.pop("my_broken", None)


def _offer(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text, "utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[mfuser]\n{name} = {name}\n", "utf-8")


def test_a_taken_name_fails_the_check(
    tmp_path: Path, mfuser: Run, offered: Callable[..., None]
) -> None:
    """Installed or a file: a verdict and exit code 1, beside what else is wrong."""
    offered("my_broken", BROKEN.replace('name="my_broken"', 'name="mvfuser"'))
    for module in ("my_broken", tmp_path / "my_broken.py"):
        shown = mfuser("plugin", "check", module, "--pairings", 1)
        if module == "my_broken":
            assert shown.code == 1, shown.err
            assert "'mvfuser' is also offered by plugin 'mvfuser'" in shown.out
            assert "FAIL  name" in shown.out and "FAIL  gradients" in shown.out
            sys.modules.pop("my_broken")
            (tmp_path / "my_broken-1.0.dist-info" / "entry_points.txt").unlink()
        else:
            assert shown.code == 1 and "FAIL  name" in shown.out


def test_what_an_import_changes_fails_the_check(tmp_path: Path, mfuser: Run) -> None:
    file = tmp_path / "my_broken.py"
    file.write_text("import torch\ntorch.set_default_dtype(torch.float64)\n" + BROKEN, "utf-8")
    sys.modules.pop("mfuser_plugin_my_broken", None)
    shown = mfuser("plugin", "check", file, "--pairings", 1)
    assert shown.code == 1 and "FAIL  import" in shown.out
    assert "it changed the default dtype from torch.float32 to torch.float64" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "no_such_module"), "there is no module 'no_such_module'"),
        (("check", "no_such_file.py"), "there is no file no_such_file.py"),
        (("check",), "Missing argument 'MODULE'"),
        (("new", "x"), "Missing option '--kind'"),
        (("new", "x", "--kind", "fision"), "is not one of"),
        (("new", "My Plugin", "--kind", "fusion"), "is not a package name"),
        (("new", "timm", "--kind", "backbone"), "a module 'timm' is installed already"),
        (("new", "mvfuser", "--kind", "fusion"), "a fusion component is called 'mvfuser'"),
        (("nwe", "x"), "did you mean 'new'"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: tuple[str, ...], said: str, inside: Path, mfuser: Run
) -> None:
    shown = mfuser("plugin", *arguments)
    assert shown.code == 2
    assert said in shown.err and "Traceback" not in shown.err
    assert not list(inside.iterdir())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write("my-fusion", "fusion", tmp_path / "a")
    with pytest.raises(PluginError, match="exists already and is not empty"):
        write("my-fusion", "fusion", tmp_path / "a")
