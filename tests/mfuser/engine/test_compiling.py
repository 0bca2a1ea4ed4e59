"""Compilation in place: one graph for each part, shared by equal blocks, and a way on without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from odd import photo
from torch import nn

from mfuser import DGSSModel, Registry, build_model
from mfuser.config.compilation import CompileSpec
from mfuser.engine import checkpoints, compiling
from mfuser.engine.evaluate import evaluate
from mfuser.engine.precheck import check_parts
from mfuser.engine.train import train
from mfuser.errors import MFuserError

PARTS = ("encoders", "adapters", "decoder")
PART = 'parts=["decoder"]'
"""Of a test that compiles often: the quickest."""


@pytest.fixture(scope="module")
def model(tiny: Registry) -> DGSSModel:
    return build_model("tiny", tiny)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Sets the compiler's backend; the compiler is as it was afterwards."""
    import torch._dynamo
    import torch._functorch.config as functorch

    lazy = "force_non_lazy_backward_lowering"
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(recompile_limit=8),
        functorch.patch(**{lazy: False} if hasattr(functorch, lazy) else {}),
    ):
        yield lambda chosen: monkeypatch.setattr(compiling, "BACKEND", chosen)
    torch._dynamo.reset()


def collected(backend: Callable[[Any], None]) -> list[Any]:
    """The graphs that are compiled from here on; they run as they are."""
    graphs: list[Any] = []

    def collecting(graph: Any, given: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    backend(collecting)
    return graphs


def first_calls(model: DGSSModel, images: torch.Tensor) -> dict[str, tuple[nn.Module, Any, Any]]:
    """The first call of each kind of module that is compiled: it and its arguments."""
    found: dict[str, tuple[nn.Module, Any, Any]] = {}
    handles = []
    for module in compiling.compilable(model, PARTS):

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(type(module).__name__, (module, args, kwargs))

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    model(images)
    for handle in handles:
        handle.remove()
    return found


def test_no_graph_breaks(model: DGSSModel, images: torch.Tensor, backend: Any) -> None:
    """In training. In inference: one graph each is counted by the next test."""
    calls = first_calls(model.train(), images)
    assert calls.keys() == {
        *("Block", "ResidualAttentionBlock"),  # of timm and of open_clip
        *("MVFuserAdapter", "MTEnhancer", "TextMask2Former"),
    }
    for name, (module, args, kwargs) in calls.items():
        seen = torch._dynamo.explain(module)(*args, **kwargs)
        assert (seen.graph_count, seen.graph_break_count) == (1, 0), (name, seen.break_reasons)


def test_equal_blocks_share_their_code(
    model: DGSSModel, images: torch.Tensor, backend: Callable[[Any], None]
) -> None:
    graphs = collected(backend)
    names, compiled = list(model.state_dict()), copy.deepcopy(model).eval()
    said: list[str] = []
    compiling.compile_parts(compiled, CompileSpec(), said.append)
    with torch.no_grad():
        want = model.eval()(images).decoder.masks[-1]
        found = compiled(images).decoder.masks[-1]
        # Three blocks of one tower, two of the other, two adapters, enhancer and decoder.
        assert len(graphs) == 5 and not said
        assert torch.equal(found, want)
        with compiling.uncompiled(compiled):
            torch._dynamo.reset()
            compiled(images)
        assert len(graphs) == 5
        alone = copy.deepcopy(compiled)
        assert torch.equal(alone(images).decoder.masks[-1], want) and len(graphs) == 5
    assert list(compiled.state_dict()) == names
    assert all(m._compiled_call_impl is None for m in alone.modules())


def test_what_cannot_be_compiled_is_said_once(
    model: DGSSModel, images: torch.Tensor, backend: Callable[[Any], None]
) -> None:
    def broken(graph: Any, given: Any) -> Any:
        raise RuntimeError("no C++ compiler was found")

    backend(broken)
    compiled, said = copy.deepcopy(model).eval(), []
    compiling.compile_parts(compiled, CompileSpec(parts=("adapters", "decoder")), said.append)
    with torch.no_grad():
        want = model.eval()(images).decoder.masks[-1]
        assert torch.equal(compiled(images).decoder.masks[-1], want)
        assert torch.equal(compiled(images).decoder.masks[-1], want)
    (sentence,) = said
    assert sentence.startswith("fusion 'mvfuser'") and "no C++ compiler was found" in sentence
    assert "going on without" in sentence


def test_errors_of_the_model_are_not_the_compilers(
    model: DGSSModel, backend: Callable[[Any], None]
) -> None:
    backend("eager")
    compiled, said = copy.deepcopy(model).eval(), []
    compiling.compile_parts(compiled, CompileSpec(parts=("decoder",)), said.append)
    with pytest.raises(MFuserError, match="takes class queries"):
        compiled.decoder([torch.rand(1, 32, n, n) for n in (16, 8, 4, 2)])
    assert not said


def test_a_compiled_run_is_the_same_run(
    tiny: Registry,
    begin: Any,
    tmp_path: Path,
    backend: Callable[[Any], None],
    mfuser: Any,
    tiny_toml: str,
) -> None:
    graphs = collected(backend)
    assert begin("plain", "compile=true").recipe.compile == CompileSpec()
    assert begin("plain", "compile=false").recipe == begin("plain").recipe
    one_step = ("steps=1", "warmup=0")
    train(tiny, begin("plain", f"compile={{{PART}}}", *one_step), tmp_path / "compiled")
    assert graphs
    train(tiny, begin("plain", *one_step), tmp_path / "eager")
    one, other = (
        checkpoints.read(tmp_path / n / checkpoints.FINAL).model for n in ("compiled", "eager")
    )
    assert list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)

    domains = []
    for wanted in (False, True):
        graphs.clear()
        torch._dynamo.reset()
        settings = [f"compile.{PART}"] if wanted else []
        found = evaluate(tiny, tmp_path / "eager", limit=1, compile=wanted, settings=settings)
        domains.append(found.domains)
        assert bool(graphs) == wanted
    assert domains[0] == domains[1]

    graphs.clear()
    torch._dynamo.reset()
    image, out = photo(tmp_path / "a.png"), tmp_path / "out"
    (tmp_path / "tiny.toml").write_text(tiny_toml, "utf-8")
    registry = ("--registry", tmp_path / "tiny.toml")
    given = ("--compile", "--set", f"compile.{PART}", "--out", out, *registry)
    done = mfuser("predict", tmp_path / "eager", image, *given)
    assert done.code == 0 and graphs and (out / "a.mask.png").is_file()
    done = mfuser("predict", tmp_path / "eager", image, "--set", "compile.mode=1", *registry)
    assert done.code == 2 and "--set compile.mode = 1: " in done.err


def test_the_look_before_the_first_step_compiles_nothing(
    model: DGSSModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the hooks that look would be compiled, and everything a second time without them."""

    def compiled(*_: Any, **__: Any) -> None:
        pytest.fail("compiled code ran")

    parts = compiling.compilable(model, PARTS)
    for part in parts:
        monkeypatch.setattr(part, "_compiled_call_impl", compiled)
    check_parts(model, torch.device("cpu"))
    assert all(part._compiled_call_impl is compiled for part in parts)


@pytest.mark.parametrize(
    ("wanted", "settings", "compiled"),
    [
        (False, ["fusion.every=2"], None),
        (True, [], CompileSpec()),
        (False, ["compile.mode=reduce-overhead"], CompileSpec(mode="reduce-overhead")),
        (True, ['compile.parts=["decoder"]'], CompileSpec(parts=("decoder",))),
    ],
)
def test_what_a_command_asks_for(
    wanted: bool, settings: list[str], compiled: CompileSpec | None
) -> None:
    others = [s for s in settings if not s.startswith("compile")]
    assert compiling.asked(wanted, settings) == (compiled, others)


def test_unknown_ways_to_compile() -> None:
    with pytest.raises(MFuserError, match="--set compile.mode = 'fast': .*'reduce-overhead'"):
        compiling.asked(True, ["compile.mode=fast"])
    with pytest.raises(MFuserError, match=r"--set compile.mod: there is no such key.*'mode'"):
        compiling.asked(True, ["compile.mod=fast"])
