"""A stranger's plugin that misbehaves: it is named, and the others go on working."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mfuser import MFuserError
from mfuser.plugins.discovery import components_with, load_components

GOOD = """
from mfuser import FusionSpec, hookimpl

class GoodSpec(FusionSpec, name="good"):
    '''Nothing.'''
    def build(self, vfm, vlm):
        return None

@hookimpl
def mfuser_components():
    return [GoodSpec]
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes a module and the metadata of an installed distribution that offers it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name: str, source: str, requires: str = "", entry: str = "") -> None:
        (tmp_path / f"{name}.py").write_text(source, "utf-8")
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}", "utf-8"
        )
        (info / "entry_points.txt").write_text(f"[mfuser]\n{entry or name} = {name}\n", "utf-8")
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def causes() -> dict[str, str]:
    return {b.plugin.split(" ")[0]: b.cause for b in load_components().broken}


def test_installed_plugin_is_found(install: Install) -> None:
    install("stranger_good", GOOD)
    found = load_components()
    assert not found.broken
    assert found.kind("fusion")["good"].plugin == "stranger_good"


def test_raising_plugin_is_named_and_the_others_work(install: Install) -> None:
    install("stranger_bad", "raise RuntimeError('no license')")
    install("stranger_exit", "import sys\nsys.exit(3)")
    install("stranger_good", GOOD)
    found = load_components()
    broken = {b.plugin: b.cause for b in found.broken}
    cause = broken["stranger_bad (stranger_bad)"]
    assert re.fullmatch(r"RuntimeError: no license \(.*stranger_bad\.py, line 1\)", cause)
    assert "SystemExit: 3" in broken["stranger_exit (stranger_exit)"]
    assert {"good", "none"} <= set(found.kind("fusion"))


def test_slow_plugin_is_named_with_its_seconds(
    install: Install, mfuser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no limit: the disk may be slow, not the plugin. Nothing is interrupted."""
    monkeypatch.setenv("MFUSER_PLUGINS", "stranger_slow,linear")
    monkeypatch.setattr("mfuser.config.registry.installed_components", load_components)
    install("stranger_slow", "import time\ntime.sleep(0.3)\n" + GOOD)
    shown = json.loads(mfuser("list", "plugins", "--json").out)["plugins"]
    seconds = {p["name"]: p["seconds"] for p in shown}
    assert set(seconds) == {"stranger_slow", "linear"} and seconds["stranger_slow"] >= 0.3
    sys.modules.pop("stranger_slow")
    assert re.search(r"stranger_slow +\d+\.\d\d s", mfuser("list", "plugins").out)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (">=0.1,<0.2", ""),
        (">=7", "it works with mfuser >=7, and this is"),
        ("seven", "is not a version specifier"),
        (7, "is not a version specifier"),
    ],
)
def test_declared_version(install: Install, text: object, expected: str) -> None:
    install("stranger_version", f"mfuser_requires = {text!r}\n{GOOD}")
    cause = causes().get("stranger_version", "")
    assert (expected in cause) if expected else not cause


def test_version_of_the_package_is_checked_before_it_is_imported(
    install: Install, tmp_path: Path
) -> None:
    install("stranger_new", f"open({str(tmp_path / 'ran')!r}, 'w')\n{GOOD}", "mfuser (>=7)")
    assert "its package stranger_new works with mfuser >=7" in causes()["stranger_new"]
    assert not (tmp_path / "ran").exists()


def test_shadowed_name_names_both_and_the_way_out(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("stranger_none", GOOD.replace('"good"', '"none"'))
    with pytest.raises(MFuserError, match="named 'none'.*'no_fusion'.*'stranger_none'") as error:
        load_components()
    assert "MFUSER_PLUGINS=-stranger_none" in str(error.value)
    monkeypatch.setenv("MFUSER_PLUGINS", "-stranger_none")
    assert load_components().kind("fusion")["none"].plugin == "no_fusion"


@pytest.mark.parametrize("given", [None, "linear,no_fusion,{entry}", "-mvfuser"])
@pytest.mark.parametrize("entry", ["stranger_none", "no_fusion", "linear"])
def test_the_way_out_of_a_taken_name_works(
    install: Install, mfuser: Any, monkeypatch: pytest.MonkeyPatch, entry: str, given: str | None
) -> None:
    """As printed: beside what is set already, and where the plugin's own name is taken too."""
    monkeypatch.setattr("mfuser.config.registry.installed_components", load_components)
    install("stranger_none", GOOD.replace('"good"', '"none"'), entry=entry)
    if given is not None:
        monkeypatch.setenv("MFUSER_PLUGINS", given.format(entry=entry))
    failed = mfuser("list", "plugins")
    assert failed.code == 2
    (way,) = re.findall(r"set MFUSER_PLUGINS=(\S+)", failed.err)
    monkeypatch.setenv("MFUSER_PLUGINS", way)
    shown = mfuser("list", "fusion", "--json")
    assert shown.code == 0, shown.err
    assert "none" in {c["name"] for c in json.loads(shown.out)["fusion"]}


def test_the_way_out_for_a_plugin_that_was_asked_for(
    tmp_path: Path, mfuser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mfuser.config.registry.installed_components", load_components)
    file = tmp_path / "taken.py"
    file.write_text(GOOD.replace('"good"', '"none"'), "utf-8")
    failed = mfuser("list", "fusion", "--plugin", file)
    assert f"leave '{file}' out of --plugin and [plugins]" in failed.err
    (way,) = re.findall(r"set MFUSER_PLUGINS=(\S+)", failed.err)
    monkeypatch.setenv("MFUSER_PLUGINS", way)
    shown = mfuser("list", "fusion", "--plugin", file, "--json")
    plugins = {c["name"]: c["plugin"] for c in json.loads(shown.out)["fusion"]}
    assert plugins["none"] == str(file)


def test_entry_point_of_a_known_name_does_not_hide_the_other(install: Install) -> None:
    install("stranger_good", GOOD, entry="linear")
    found = load_components()
    assert {"linear"} <= set(found.kind("decoder"))
    assert found.kind("fusion")["good"].plugin == "linear (stranger_good)" or (
        found.kind("decoder")["linear"].plugin.startswith("linear (")
    )


def test_narrowing(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("stranger_bad", "raise RuntimeError")
    monkeypatch.setenv("MFUSER_PLUGINS", "linear, no_fusion")
    found = load_components()
    assert set(found.kind("decoder")) == {"linear"} and set(found.kind("fusion")) == {"none"}
    assert not found.kind("vision") and not found.broken
    monkeypatch.setenv("MFUSER_PLUGINS", "")
    assert not load_components().kind("fusion")
    monkeypatch.setenv("MFUSER_PLUGINS", "-stranger_bad")
    assert not load_components().broken and load_components().kind("vision")
    monkeypatch.setenv("MFUSER_PLUGINS", "liner")
    with pytest.raises(MFuserError, match="'liner'; did you mean 'linear'"):
        load_components()


def test_asked_for_by_name_is_loaded_whatever_is_narrowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFUSER_PLUGINS", "linear")
    file = tmp_path / "mine.py"
    file.write_text(GOOD, "utf-8")
    assert set(load_components([str(file)]).kind("fusion")) == {"good"}
    file.write_text("raise RuntimeError('no')", "utf-8")
    sys.modules.pop("mfuser_plugin_mine", None)
    with pytest.raises(MFuserError, match="mine.py' cannot be used: RuntimeError: no"):
        load_components([str(file)])


def test_asked_for_once_is_not_there_for_the_next(tmp_path: Path) -> None:
    """Installed components are found once per process, and stay as they were."""
    file = tmp_path / "once.py"
    file.write_text(GOOD, "utf-8")
    for _ in range(2):
        asked = components_with([str(file)])
        assert asked.kind("fusion")["good"].plugin == str(file)
        assert {p.plugin for p in asked.loaded} > {p.plugin for p in components_with(()).loaded}
        assert "good" not in components_with(()).kind("fusion")
    file.write_text("raise RuntimeError('no')", "utf-8")
    sys.modules.pop("mfuser_plugin_once", None)
    with pytest.raises(MFuserError, match="once.py' cannot be used: RuntimeError: no"):
        components_with([str(file)])
    assert "none" in components_with(()).kind("fusion")
