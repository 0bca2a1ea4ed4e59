"""One door for everybody's plugins: how they are found, checked, refused and reported."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mfuser import MFuserError, components, load_registry
from mfuser.plugins.discovery import load_components

GOOD = """
    from mfuser import FusionSpec, hookimpl

    CALLS = []

    class SwapSpec(FusionSpec, name="swap"):
        '''Swaps.'''
        share: float = 0.1
        def build(self, vfm, vlm):
            return None

    @hookimpl
    def mfuser_components():
        CALLS.append(1)
        return [SwapSpec]
"""

HEAD = """
    from mfuser import DecoderSpec, FusionSpec, hookimpl

    class SwapSpec(FusionSpec, name="swap"):
        def build(self, vfm, vlm):
            return None
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "swap_plugin.py") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), "utf-8")
        return path

    return write


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin):  # type: ignore[no-untyped-def]
    """Makes modules look installed: a folder on the path with entry points of the group."""

    def install(**texts: str) -> None:
        for name, text in texts.items():
            plugin(text, f"{name}.py")
        info = tmp_path / "stranger-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
        lines = [f"{name} = {name}" for name in texts]
        (info / "entry_points.txt").write_text("\n".join(["[mfuser]", *lines]) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_the_built_in_plugins_come_through_entry_points() -> None:
    found = load_components()
    assert not found.broken
    assert found.kind("fusion")["mvfuser"].plugin == "mvfuser"
    assert {"timm", "transformers"} <= set(found.kind("vision"))
    assert {"open_clip", "dual_encoder"} <= set(found.kind("vision_language"))
    assert {"streets", "gta", "synthia", "cityscapes", "acdc"} <= set(found.kind("dataset"))


def test_public_components() -> None:
    linear = components("decoder")["linear"]
    assert linear.component() == "linear" and linear.kind == "decoder"
    with pytest.raises(MFuserError, match="no kind .*'decoders'; did you mean 'decoder'"):
        components("decoders")


def test_a_file_is_a_plugin_and_its_hook_is_called_once(plugin) -> None:  # type: ignore[no-untyped-def]
    path = str(plugin(GOOD))
    found = load_components([path])
    component = found.kind("fusion")["swap"]
    assert component.plugin == path
    module = __import__("sys").modules[component.spec.__module__]
    assert module.CALLS == [1]
    found.kind("fusion"), found.validate(("fusion",), "swap")
    assert module.CALLS == [1]


def test_a_module_is_a_plugin(plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    plugin(GOOD, "stranger_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_components(["stranger_module"]).kind("fusion")["swap"].plugin == "stranger_module"


def test_a_registry_file_loads_plugins_from_beside_itself(
    plugin, write_registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    plugin(GOOD)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = write_registry('[plugins]\nload = ["swap_plugin.py"]\n')
    registry = load_registry(file)
    assert registry.pairing("tiny", ['fusion={name="swap", share=2}']).fusion.model_dump() == {
        "name": "swap",
        "every": 1,
        "share": 2.0,
    }
    with pytest.raises(MFuserError, match="fusion.share: .*|no such"):
        registry.pairing("tiny", ['fusion={name="swap", shar=2}'])


def test_asking_twice_loads_once(plugin) -> None:  # type: ignore[no-untyped-def]
    path = str(plugin(GOOD))
    assert list(load_components([path, path]).kind("fusion")) == ["mvfuser", "none", "swap"] or (
        "swap" in load_components([path, path]).kind("fusion")
    )
    # An installed plugin that is also asked for is one plugin.
    assert "linear" in load_components(["mfuser_plugins.decoders.linear"]).kind("decoder")


def test_an_installed_plugin_that_fails_is_reported_and_the_others_go_on(installed) -> None:  # type: ignore[no-untyped-def]
    installed(
        bad_import="raise RuntimeError('no license today')",
        bad_syntax="def f(:",
        bad_exit="raise SystemExit(3)",
        bad_missing="import a_module_that_is_not_there",
        bad_none="x = 1",
        good_one=GOOD,
    )
    found = load_components()
    causes = {b.plugin.split(" ")[0]: b.cause for b in found.broken}
    assert set(causes) == {"bad_import", "bad_syntax", "bad_exit", "bad_missing", "bad_none"}
    assert causes["bad_import"].startswith("RuntimeError: no license today (")
    assert causes["bad_import"].endswith("bad_import.py, line 1)")
    assert causes["bad_syntax"].startswith("SyntaxError")
    assert "a_module_that_is_not_there" in causes["bad_missing"]
    assert "no hook marked with @hookimpl" in causes["bad_none"]
    assert "swap" in found.kind("fusion") and "linear" in found.kind("decoder")


def test_broken_plugins_are_listed_and_named_where_a_component_is_missed(
    installed, mfuser, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    installed(bad_import="raise RuntimeError('no license today')")
    found = load_components()
    with pytest.raises(
        ValueError, match="no fusion component is called 'swap'.*failed to load: bad"
    ):
        found.validate(("fusion",), "swap")
    monkeypatch.setattr("mfuser.config.registry.installed_components", lambda: found)
    result = mfuser("list", "plugins", "--json")
    assert result.code == 0
    ((name, cause),) = [
        (p["name"], p["broken"]) for p in json.loads(result.out)["plugins"] if "broken" in p
    ]
    assert name == "bad_import (bad_import)"
    assert cause.startswith("RuntimeError: no license today (")
    assert "failed to load: RuntimeError: no license today" in mfuser("list").out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError.*a_module_that_is_not_there"),
        (HEAD, r"no hook marked with @hookimpl.*mfuser_components"),
        (
            HEAD + "\n    def mfuser_components():\n        return [SwapSpec]\n",
            "it defines mfuser_components, unmarked",
        ),
        (
            HEAD + "\n    @hookimpl\n    def mfuser_component():\n        return [SwapSpec]\n",
            "unknown hook 'mfuser_component'",
        ),
        (
            HEAD
            + "\n    @hookimpl\n    def mfuser_components(extra):\n        return [SwapSpec]\n",
            "extra",
        ),
        (
            HEAD + "\n    @hookimpl\n    def mfuser_components():\n        return [3]\n",
            "returned 3, which is not a spec class: subclass VisionSpec",
        ),
        (
            HEAD + "\n    @hookimpl\n    def mfuser_components():\n        return [FusionSpec]\n",
            "spec .FusionSpec. has no name",
        ),
        (
            HEAD + "\n    @hookimpl\n    def mfuser_components():\n        1 / 0\n",
            "ZeroDivisionError",
        ),
        (
            HEAD + "\n    @hookimpl\n    def mfuser_components():\n        return SwapSpec\n",
            "not a list of spec classes: write return",
        ),
        (
            HEAD + "\n    @hookimpl\n    def mfuser_components():\n        pass\n",
            "returned None, not a list",
        ),
        (
            HEAD
            + "\n    class Bare(DecoderSpec, name='bare'):\n        pass\n"
            + "\n    @hookimpl\n    def mfuser_components():\n        return [Bare]\n",
            r"'Bare' does not define build\(\)",
        ),
    ],
)
def test_a_plugin_asked_for_that_cannot_be_used_is_an_error(
    plugin, mfuser, text: str, message: str
) -> None:  # type: ignore[no-untyped-def]
    path = plugin(text)
    with pytest.raises(MFuserError, match=message) as caught:
        load_components([str(path)])
    assert str(path) in str(caught.value)
    result = mfuser("list", "--plugin", path)
    assert result.code == 2 and result.err.count("\n") == 1 and str(path) in result.err


def test_two_plugins_of_one_name_are_both_named(plugin) -> None:  # type: ignore[no-untyped-def]
    first, second = plugin(GOOD, "first.py"), plugin(GOOD, "second.py")
    with pytest.raises(MFuserError, match="two plugins offer a fusion component named 'swap'") as c:
        load_components([str(first), str(second)])
    assert str(first) in str(c.value) and str(second) in str(c.value)
    taken = plugin(GOOD.replace('name="swap"', 'name="mvfuser"'), "taken.py")
    with pytest.raises(MFuserError, match="named 'mvfuser': 'mvfuser' and '.*taken.py'"):
        load_components([str(taken)])


def test_what_is_not_there(plugin) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MFuserError, match=r"'nope\.py' cannot be used: there is no file nope\.py"):
        load_components(["nope.py"])
    with pytest.raises(MFuserError, match="there is no module 'not_a_module_at_all'"):
        load_components(["not_a_module_at_all"])


def test_fusion_for_two_encoders_needs_two(plugin, write_registry) -> None:  # type: ignore[no-untyped-def]
    registry = load_registry(write_registry(), plugins=[str(plugin(GOOD))])
    with pytest.raises(
        MFuserError, match="fusion 'swap' joins two encoders, and there is only one"
    ):
        registry.pairing("lone", ["fusion=swap"])
