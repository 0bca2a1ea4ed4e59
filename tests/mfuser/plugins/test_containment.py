"""Changes that a plugin makes to the process are undone and named; its prints stay off stdout."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import forked
from mean_plugin import mean_plugin

from mfuser import MFuserError, Registry, build_model
from mfuser.errors import PluginWarning
from mfuser.plugins.containment import contained
from mfuser.plugins.discovery import load_components


def state() -> list[Any]:
    return [
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        list(warnings.filters),
    ]


HEAD = "import random, warnings\nimport numpy, torch\n"
TAMPERING = {
    "torch.set_default_dtype(torch.float64)": "default dtype from torch.float32 to torch.float64",
    "torch.set_default_device('meta')": "the default device from cpu to meta",
    "torch.set_grad_enabled(False)": "the grad mode from True to False",
    "torch.set_num_threads(3)": "the number of threads from 1 to 3",
    "torch.use_deterministic_algorithms(True, warn_only=True)": "deterministic algorithms",
    "torch.autograd.set_detect_anomaly(True)": "anomaly detection from False to True",
    "torch.set_float32_matmul_precision('high')": "the precision of float32 products",
    "torch.backends.cudnn.benchmark = True": "torch.backends.cudnn.benchmark from False to True",
    "torch.manual_seed(0)": "torch's random generator",  # build_model's own seed
    "torch.manual_seed(1)": "torch's random generator",
    "random.seed(1)": "Python's random generator",
    "numpy.random.seed(1)": "NumPy's random generator",
    "warnings.simplefilter('ignore')": "the warnings filters",
    "warnings.resetwarnings()": "the warnings filters",
}


def plugin(head: str = "", **lines: str) -> str:
    return mean_plugin(HEAD + head, **lines)


@pytest.fixture
def load(load_plugin: Callable[[str, str], Registry]) -> Callable[[str], Registry]:
    return lambda text: load_plugin("stranger", text)


def said(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if w.category is PluginWarning]


@pytest.mark.parametrize(("line", "named"), TAMPERING.items(), ids=list(TAMPERING))
def test_what_an_import_changes_is_put_back_and_named(
    load: Callable[[str], Registry], line: str, named: str
) -> None:
    torch.rand(3)  # not where `manual_seed(0)` would put it
    before = state()
    with pytest.warns(PluginWarning) as caught:
        registry = load(plugin(line))
    assert state() == before
    (text,) = said(caught)
    assert "stranger.py' changed " in text and named in text and "it was put back" in text
    changed = {p.plugin.split("/")[-1]: p.changed for p in registry.components.loaded if p.changed}
    assert list(changed) == ["stranger.py"] and len(changed["stranger.py"]) == 1
    assert "mean" in registry.components.kind("fusion")


@pytest.mark.parametrize(("line", "named"), TAMPERING.items(), ids=list(TAMPERING))
def test_what_a_build_changes_is_put_back_and_named(
    load: Callable[[str], Registry], line: str, named: str
) -> None:
    sound = build_model("tiny", load(plugin()), fusion="mean").state_dict()
    registry = load(plugin(build=line))
    before = state()
    with pytest.warns(PluginWarning) as caught:
        model = build_model("tiny", registry, fusion="mean")
    assert state() == before
    for text in said(caught):
        assert text.startswith("fusion 'mean' (plugin mfuser_plugin_stranger): build() changed ")
        assert named in text
    # What is built after it is what it would be without it.
    state_dict = model.state_dict()
    assert all(state_dict[n].dtype == sound[n].dtype for n in sound)
    later = [n for n in sound if n.startswith(("pyramid.", "decoder."))]
    if "torch.manual_seed" not in line:
        assert later and all(torch.equal(state_dict[n], sound[n]) for n in later)


def test_a_seeded_build_does_not_decide_what_comes_after_it(
    load: Callable[[str], Registry],
) -> None:
    registry = load(plugin(build="torch.manual_seed(1)"))
    with pytest.warns(PluginWarning):
        one, two = (build_model("tiny", registry, fusion="mean", seed=s) for s in (0, 1))
    names = [n for n in one.state_dict() if n.startswith("decoder.") and "weight" in n]
    assert any(not torch.equal(one.state_dict()[n], two.state_dict()[n]) for n in names)


def test_drawing_weights_is_what_a_build_may_do(load: Callable[[str], Registry]) -> None:
    registry = load(plugin(build="torch.randn(3)"))
    before = torch.initial_seed()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PluginWarning)
        build_model("tiny", registry, fusion="mean")
    assert torch.initial_seed() == before
    torch.manual_seed(5)
    expected = [torch.randn(n) for n in (700, 700, 600)]
    torch.manual_seed(5)
    drawn = [torch.randn(700)]
    with contained(draws=True) as changed:
        drawn.append(torch.randn(700))
    drawn.append(torch.randn(600))
    assert not changed and torch.initial_seed() == 5
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_a_build_that_raises_leaves_the_process_as_it_was(
    load: Callable[[str], Registry],
) -> None:
    registry = load(plugin(build="torch.set_grad_enabled(False); raise RuntimeError('no')"))
    with pytest.raises(MFuserError, match=r"RuntimeError: no \(.*stranger\.py, line \d+\)"):
        build_model("tiny", registry, fusion="mean")
    assert torch.is_grad_enabled()


def test_a_fault_inside_torch_points_to_the_line_that_called_it(
    load: Callable[[str], Registry], tmp_path: Path
) -> None:
    text = plugin(build="nn.MultiheadAttention(7, 2)")  # 2 heads do not divide 7
    registry = load(text)
    line = text.split("\n").index("        nn.MultiheadAttention(7, 2)") + 1
    with pytest.raises(MFuserError) as error:
        build_model("tiny", registry, fusion="mean")
    assert str(error.value).endswith(f"({tmp_path / 'stranger.py'}, line {line})")


def test_a_dataset_is_contained_too(tiny: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfuser.config.run import domains

    (domain,) = domains(tiny, "toy")
    spec = type(domain.spec)
    original = spec.build  # type: ignore[union-attr]
    monkeypatch.setattr(
        spec, "build", lambda *a: (np.random.seed(0), original(*a))[1], raising=True
    )
    before = state()
    with pytest.warns(PluginWarning, match="dataset 'streets' .* NumPy's random generator"):
        domain.build(tiny, "train")
    assert state() == before


def test_libraries_keep_the_filters_of_their_own_warnings() -> None:
    before = list(warnings.filters)
    try:
        with contained() as changed:
            warnings.filterwarnings("ignore", category=PluginWarning)
            warnings.filterwarnings("ignore", module="somewhere")
        assert not changed and len(warnings.filters) == len(before) + 2
    finally:
        warnings.filters[:] = before  # type: ignore[index]


def test_prints_leave_json_alone(tmp_path: Path, tiny_toml: str) -> None:
    """At import, in the hook, in build() and in forward(); in a process, down to the pipe."""
    text = plugin(
        "print('from the import')",
        hook="print('from the hook')",
        build="print('from build')",
        before="print('from forward')",
    )
    (tmp_path / "prints.py").write_text(text, "utf-8")
    (tmp_path / "r.toml").write_text(tiny_toml, "utf-8")
    command = ["train", "tiny", "--recipe", "tiny"]
    command += ["--plugin", "prints.py", "--registry", "r.toml", "--set", "fusion=mean"]
    command += ["--set", "decoder=linear", "--out", "run", "--steps", "1", "--json"]
    ran = forked(command, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "domains" in json.loads(ran.stdout)
    for place in ("the import", "the hook", "build", "forward"):
        assert f"from {place}" in ran.stderr


def test_warnings_about_plugins_are_sentences(tmp_path: Path, tiny_toml: str, mfuser: Any) -> None:
    (tmp_path / "noisy.py").write_text(plugin("torch.set_default_dtype(torch.float64)"), "utf-8")
    sys.modules.pop("mfuser_plugin_noisy", None)
    shown = mfuser("list", "plugins", "--plugin", tmp_path / "noisy.py")
    assert shown.code == 0
    (line,) = [x for x in shown.err.split("\n") if x]
    assert line.startswith("mfuser: plugin '") and line.endswith("it was put back")
    assert "changed the default dtype from torch.float32 to torch.float64" in shown.out
    assert load_components().loaded  # the process goes on as before
    assert torch.get_default_dtype() == torch.float32
