"""Strangers' components in a training: refused by name before the first step, or found in it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mean_plugin import mean_plugin
from torch import Tensor

from mfuser import MFuserError, Registry, build_model
from mfuser.config.run import RunSpec
from mfuser.engine import checkpoints
from mfuser.engine.diagnose import DIVERGED, Diverged, replay
from mfuser.engine.precheck import check_parts
from mfuser.engine.train import Trainer, train
from mfuser.errors import PluginError

FUSION = mean_plugin(
    "import torch\nCALLS = []\n", after="if self.training: CALLS.append(1)\n        FAULT"
)

DECODER = """
import torch
import torch.nn.functional as F
from mfuser import IGNORE, Decoder, DecoderOutput, DecoderSpec, hookimpl
from torch import nn

class Plain(Decoder):
    def __init__(self, channels, classes):
        super().__init__()
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(self, pyramid, queries=None):
        return DecoderOutput([self.head(pyramid[0])])

    def loss(self, output, labels):
        logits = self.semantic_logits(output, tuple(labels.shape[-2:]))
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        FAULT
        return {"loss_ce": loss}

    def semantic_logits(self, output, size):
        return F.interpolate(output.masks[-1], size, mode="bilinear")

class PlainSpec(DecoderSpec, name="plain"):
    "One convolution."
    def build(self, channels, num_classes, text_dim):
        return Plain(channels, num_classes CLASSES)

@hookimpl
def mfuser_components():
    return [PlainSpec]
"""


@pytest.fixture
def load(load_plugin: Callable[[str, str], Registry]) -> Callable[..., Registry]:
    def load(text: str, fault: str = "pass", classes: str = "") -> Registry:
        return load_plugin("odd", text.replace("FAULT", fault).replace(" CLASSES", classes))

    return load


def run_of(registry: Registry, setting: str, *recipe: str) -> RunSpec:
    return RunSpec.of(
        registry,
        "plain",
        "tiny",
        pairing=registry.pairing("plain", [setting]),
        recipe=registry.recipe("tiny", recipe),
    )


# ---- before the first step


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("return None, None", r"returns \(None, None\) at all 2 positions, so nothing is fused"),
        ("vfm_tokens += 1", "changes in place what it is given"),
        ("vlm_tokens.data.mul_(2)", "changes in place what it is given"),
        ("vfm = vfm[:, 1:]", "the offset of the vfm has shape"),
        ("torch.ones(2) @ torch.ones(3)", r"raised RuntimeError: .*odd\.py, line \d+\)"),
        ("raise KeyError('lost')", r"raised KeyError: 'lost' \(.*odd\.py, line \d+\)"),
    ],
)
def test_adapters_are_refused_before_the_first_step(
    load: Callable[..., Registry], tmp_path: Path, fault: str, said: str
) -> None:
    registry = load(FUSION, fault)
    with pytest.raises(PluginError, match=rf"^fusion 'mean' \(plugin .*\): .*{said}"):
        train(registry, run_of(registry, "fusion=mean"), tmp_path / "run")
    assert not sys.modules["mfuser_plugin_odd"].CALLS  # nothing was trained
    assert not (tmp_path / "run").exists()


def test_an_adapter_may_return_nothing_at_some_positions(
    load: Callable[..., Registry], tmp_path: Path
) -> None:
    registry = load(FUSION, "return (vfm, None) if vfm_tokens.mean() else (None, None)")
    train(registry, run_of(registry, "fusion=mean", "steps=1", "warmup=0"), tmp_path / "run")


@pytest.mark.parametrize("classes", ["+ 1", "- 1"])
def test_a_decoder_of_another_class_count(
    load: Callable[..., Registry], tmp_path: Path, classes: str
) -> None:
    registry = load(DECODER, classes=classes)
    count = 19 + int(classes.replace(" ", ""))
    said = rf"decoder 'plain' .*semantic_logits\(\)'s result has shape \(1, {count}, 64, 96\); "
    with pytest.raises(PluginError, match=said):
        train(registry, run_of(registry, "decoder=plain"), tmp_path / "run")


@pytest.mark.parametrize(
    ("freeze", "trains", "said"),
    [
        ("true", True, r"freeze = true, and \d+ of its tensors train, e\.g\. '"),
        ("false", False, "freeze = false, and nothing in it trains"),
    ],
)
def test_a_backbone_that_ignores_freeze(
    tiny: Registry, monkeypatch: pytest.MonkeyPatch, freeze: str, trains: bool, said: str
) -> None:
    spec = type(tiny.pairing("plain").vfm)
    original = spec.build  # type: ignore[union-attr]

    def build(self: Any, image_size: Any) -> Any:
        return original(self, image_size).requires_grad_(trains)

    monkeypatch.setattr(spec, "build", build)
    with pytest.raises(PluginError, match=rf"vfm 'timm': vision 'timm' \(plugin .*{said}"):
        build_model(tiny.pairing("plain", [f"vfm.freeze={freeze}"]))


@pytest.mark.parametrize("part", ["encoder.vfm", "encoder.vlm"])
def test_a_backbone_that_changes_its_tokens_in_place(tiny: Registry, part: str) -> None:
    model = build_model("plain", tiny)
    backbone = model.get_submodule(part)
    original = backbone.block

    def block(i: int, tokens: Tensor, state: Any) -> Tensor:
        if i == 1:
            tokens.add_(1)
        return original(i, tokens, state)  # type: ignore[no-any-return]

    backbone.block = block
    with pytest.raises(PluginError, match=r"block\(1\) changes in place what it is given"):
        check_parts(model, torch.device("cpu"))
    assert backbone.block is block  # as it was


def test_the_check_leaves_no_trace(tiny: Registry) -> None:
    model = build_model("tiny", tiny).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    check_parts(model, torch.device("cpu"))
    assert torch.equal(torch.rand(4), drawn)
    assert model.training and model.decoder.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "embed" not in vars(model.encoder.vfm) and "loss" not in vars(model.decoder)


def test_float16_on_a_cpu_is_refused(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    with pytest.raises(MFuserError, match='precision = "fp16" needs a GPU.*"bf16" or "no"'):
        train(tiny, begin("plain", "precision=fp16"), tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


# ---- a loss that is not finite


def test_the_first_part_that_is_not_finite_is_named(
    load: Callable[..., Registry], tmp_path: Path, mfuser: Any
) -> None:
    fault = "vfm = vfm / 0 if self.training and len(CALLS) > 4 else vfm"
    registry = load(FUSION, fault)
    run = run_of(registry, "fusion=mean", "save_every=1", "batch_size=2")
    with pytest.raises(Diverged) as caught:
        train(registry, run, tmp_path / "run")
    text = str(caught.value)
    assert re.search(r"the loss is nan at step 3 \(loss_\w+", text)
    assert "that of encoder.adapters.0, in fusion 'mean' (plugin mfuser_plugin_odd)" in text
    assert "lr" not in text.split(";")[0] and "lower lr" not in text
    names = re.findall(r"game_train_0_\d+", text)
    assert len(names) == 2
    assert f"mfuser train plain --out {tmp_path / 'run'} --replay" in text
    # The weights are those of the step before: nothing trained on.
    saved, last = (checkpoints.read(tmp_path / "run" / n) for n in (DIVERGED, checkpoints.LAST))
    assert saved.meta["names"] == [names] and saved.step == last.step == 2
    for name, parameter in last.model.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(parameter, saved.model[name])

    # The same again, by the command.
    again = mfuser(
        *("train", "plain", "--out", tmp_path / "run", "--replay"),
        *("--registry", tmp_path / "r.toml", "--plugin", tmp_path / "odd.py"),
    )
    assert again.code == 2 and again.err.count("\n") == 1
    assert text.split("; repeat")[0] == again.err.strip().removeprefix("mfuser: ")
    # Mended, it says so.
    load(FUSION)
    mended = mfuser(
        *("train", "plain", "--out", tmp_path / "run", "--replay", "--json"),
        *("--registry", tmp_path / "r.toml", "--plugin", tmp_path / "odd.py"),
    )
    losses = json.loads(mended.out)["losses"]
    assert mended.code == 0 and losses and all(0 < v < 100 for v in losses.values())


def test_a_loss_of_its_own_is_named(load: Callable[..., Registry], tmp_path: Path) -> None:
    registry = load(DECODER, "loss = loss * float('inf')")
    with pytest.raises(Diverged, match=r"that of decoder\.loss\(\), in decoder 'plain'"):
        train(registry, run_of(registry, "decoder=plain"), tmp_path / "run")


def test_a_module_inside_is_named(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    original = Trainer._step

    def poison(self: Trainer, step: int, batches: Any) -> Any:
        if step == 1:  # as memory that goes bad
            with torch.no_grad():
                dict(self.model.named_parameters())["pyramid.fpn1.0.weight"][0, 0] = float("nan")
        return original(self, step, batches)

    monkeypatch.setattr(Trainer, "_step", poison)
    with pytest.raises(Diverged, match=r"that of pyramid\.fpn1\.0, in the model's own code"):
        train(tiny, begin("plain"), tmp_path / "r")


@pytest.mark.parametrize("method", ["embed", "block", "finish", "project", "encode_text"])
def test_methods_of_backbones_are_named(
    tiny: Registry, begin: Any, method: str, tmp_path: Path, monkeypatch: Any
) -> None:
    original = Trainer._step

    def poison(self: Trainer, step: int, batches: Any) -> Any:
        vlm: Any = self.model.encoder.vlm
        inner = getattr(vlm, method)

        def broken(*args: Any) -> Any:
            result = inner(*args)
            if method == "embed":
                result.tokens[:, 0] = float("nan")
                return result
            if method == "project":
                return result[0], result[1] / 0
            return torch.log(-result.abs())

        setattr(vlm, method, broken)
        return original(self, step, batches)

    monkeypatch.setattr(Trainer, "_step", poison)
    said = rf"that of encoder\.vlm\.{method}\(0?\), in vision-language 'open_clip'"
    with pytest.raises(Diverged, match=said):
        train(tiny, begin("plain", "steps=1", "warmup=0"), tmp_path / "r")


def test_weights_that_have_run_away_are_said_so(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    run = begin("plain", "lr=1e30", "min_lr=0", "save_every=1000")
    with pytest.raises(Diverged, match=r"; \S+ has grown to .*: lower lr = 1e\+30 or set"):
        train(tiny, run, tmp_path / "r")


def test_accumulated_batches_are_all_replayed(
    load: Callable[..., Registry], tmp_path: Path
) -> None:
    registry = load(FUSION, "vfm = vfm / 0 if self.training and len(CALLS) > 2 else vfm")
    with pytest.raises(Diverged, match="at step 1 "):
        train(registry, run_of(registry, "fusion=mean", "accumulate=2"), tmp_path / "run")
    assert len(checkpoints.read(tmp_path / "run" / DIVERGED).meta["names"]) == 2
    fine = replay(load(FUSION), tmp_path / "run", device="cpu")
    assert all(0 < v < 100 for v in fine.values())


def test_nothing_to_replay(tiny: Registry, trained: Path) -> None:
    with pytest.raises(MFuserError, match="holds no step to replay"):
        replay(tiny, trained)
