"""Weights as people wrap them: taken out whatever is around them, or refused by what they are."""

from __future__ import annotations

import argparse
import logging
import pathlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mfuser import MFuserError, WeightsError
from mfuser_plugins.backbones.open_clip import OpenClipSpec
from mfuser_plugins.backbones.timm import TimmSpec

OPTIONS: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}
CLIP_OPTIONS: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2},
}
SIZE = (64, 96)
State = dict[str, Tensor]


def timm_spec(weights: str = "random") -> TimmSpec:
    return TimmSpec(model="vit_tiny_patch16_224", weights=weights, options=OPTIONS)


def clip_spec(weights: str = "random") -> OpenClipSpec:
    return OpenClipSpec(model="ViT-B-16", weights=weights, options=CLIP_OPTIONS)


def original(spec: Any, seed: int) -> State:
    """A state dict whose position table is of the library's size, so that files hold it as is."""
    torch.manual_seed(seed)
    return {k: v.clone() for k, v in spec.build((224, 224)).model.state_dict().items()}


TIMM, OTHER = original(timm_spec(), 0), original(timm_spec(), 1)
CLIP = original(clip_spec(), 0)


def held(path: Path | str, spec: Callable[[str], Any] = timm_spec) -> State:
    state: State = spec(str(path)).build((224, 224)).model.state_dict()
    return state


def assert_taken(path: Path | str, wanted: State, spec: Callable[[str], Any] = timm_spec) -> None:
    found = held(path, spec)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in wanted.items())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def optimizer(state: State) -> dict[str, Any]:
    model = nn.ParameterList(nn.Parameter(v.clone()) for v in list(state.values())[:3])
    made = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    made.step()
    return made.state_dict()


BESIDE: dict[str, Any] = {
    "epoch": 3,
    "step": torch.tensor(5),
    "best_acc": np.float64(0.5),
    "best": np.float32(0.5),
    "classes": np.array(["road", "sky"]),
    "rng": torch.get_rng_state(),
    "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("runs")),
    "optimizer": optimizer(TIMM),
    "optimizer_states": [optimizer(TIMM)],
    "lr_schedulers": [{"last_epoch": 2, "_last_lr": [0.1]}],
    "scaler": {"scale": 65536.0, "_growth_tracker": 7},
    "history": defaultdict(list, loss=[1.0, 0.5]),
    "none": None,
    "head.weight": torch.zeros(9, 32),
    "loss.criterion.weight": torch.zeros(19),
}

WORDS = (
    "module", "model", "net", "backbone", "_orig_mod", "state_dict", "encoder", "student",
    "teacher", "ema", "model_ema", "ema_state_dict", "ema_model", "generator", "image_encoder",
    "trunk", "vit", "network", "_fsdp_wrapped_module", "weights", "params",
)  # fmt: skip
LAYER = st.tuples(st.sampled_from(WORDS), st.booleans())


def wrap(state: State, layers: list[tuple[str, bool]], beside: list[str]) -> dict[str, Any]:
    """Prefixes and tables around a state dict, innermost first; then what lies beside it."""
    content: dict[str, Any] = dict(state)
    for word, table in layers:
        if table:
            content = {word: content}
        else:
            content = {f"{word}.{name}": value for name, value in content.items()}
    return {**content, **{name: BESIDE[name] for name in beside if name not in content}}


@given(
    layers=st.lists(LAYER, max_size=4),
    beside=st.lists(st.sampled_from(sorted(BESIDE)), unique=True, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@example(layers=[], beside=sorted(BESIDE), dtype=torch.float32)
@example(layers=[("_orig_mod", False)], beside=["optimizer"], dtype=torch.float32)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_nesting_of_wrappers_and_prefixes(
    layers: list[tuple[str, bool]], beside: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    wanted = {name: value.to(dtype) for name, value in TIMM.items()}
    torch.save(wrap(wanted, layers, beside), tmp_path / "w.pth")
    assert_taken(tmp_path / "w.pth", wanted)


@pytest.mark.parametrize("word", WORDS)
def test_open_clip_files_are_unwrapped_too(word: str, tmp_path: Path) -> None:
    torch.save({word: prefixed(CLIP, "module."), "epoch": 1}, tmp_path / "w.pt")
    assert_taken(tmp_path / "w.pt", CLIP, clip_spec)


def dino(student: State, teacher: State) -> dict[str, Any]:
    """As the training code of DINO and DINOv2 saves: both networks with their heads."""
    heads = {"head.mlp.0.weight": torch.zeros(8, 32), "head.last_layer.weight_g": torch.ones(4, 1)}
    return {
        "student": {**prefixed(student, "module.backbone."), **prefixed(heads, "module.")},
        "teacher": {**prefixed(teacher, "backbone."), **heads},
        "optimizer": optimizer(TIMM),
        "epoch": 1,
    }


def averaged(state: State) -> State:
    """As torch.optim.swa_utils.AveragedModel names its weights."""
    return {"n_averaged": torch.tensor(4), **prefixed(state, "module.")}


@pytest.mark.parametrize(("content", "said"), [
    ({"model": OTHER, "model_ema": TIMM}, r"took 'model_ema' \(averaged weights\) and not 'model'"),
    ({"state_dict": OTHER, "state_dict_ema": TIMM}, "took 'state_dict_ema'"),
    ({"ema": {"module": TIMM}, "model": OTHER}, "took 'ema.module'"),
    ({"model": OTHER, "averaged": averaged(TIMM)}, "took 'averaged.module'"),
    ({"state_dict": prefixed(OTHER, "net.") | prefixed(TIMM, "ema_model.")}, "not 'state_dict.net"),
    # MMEngine stores the averaged weights as state_dict and the plain ones beside it.
    ({"message_hub": {}, "state_dict": TIMM, "ema_state_dict": averaged(OTHER)}, "took 'state_d"),
    (dino(OTHER, TIMM), r"took 'teacher.backbone' .* and not 'student.module.backbone'"),
    ({"encoder": OTHER, "predictor": {"p": torch.zeros(2)}, "target_encoder": TIMM}, "averaged"),
])  # fmt: skip
def test_averaged_weights_come_first_and_the_choice_is_said(
    content: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "mfuser"):
        assert_taken(tmp_path / "w.pth", TIMM)
    assert re.search(said, caplog.text), caplog.text


@pytest.mark.parametrize("part", ["student", "student.module.backbone", "student.module"])
def test_another_part_can_be_chosen(part: str, tmp_path: Path) -> None:
    torch.save(dino(OTHER, TIMM), tmp_path / "w.pth")
    assert_taken(f"{tmp_path / 'w.pth'}#{part}", OTHER)
    with pytest.raises(WeightsError, match="holds no 'studnet'; did you mean 'student'"):
        held(f"{tmp_path / 'w.pth'}#studnet")


def test_two_that_fit_alike_are_asked_about(tmp_path: Path) -> None:
    torch.save({"left": TIMM, "right": OTHER}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="several sets of weights .*'left', 'right'.*#left"):
        held(tmp_path / "w.pth")
    assert_taken(f"{tmp_path / 'w.pth'}#right", OTHER)
    torch.save({"left": TIMM, "right": TIMM}, tmp_path / "w.pth")
    assert_taken(tmp_path / "w.pth", TIMM)


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heads = {"decode_head.conv.weight": torch.zeros(4, 4), "decode_head.conv.bias": torch.zeros(4)}
    torch.save({"state_dict": {**prefixed(TIMM, "backbone."), **heads}}, tmp_path / "w.pth")
    assert_taken(tmp_path / "w.pth", TIMM)
    assert "took 'state_dict.backbone'; 2 tensors of other parts were left out" in caplog.text
    caplog.clear()
    save_file(TIMM, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert_taken(tmp_path / "w.safetensors", TIMM)
    assert not caplog.text


def test_the_format_is_told_by_the_content(tmp_path: Path) -> None:
    save_file(TIMM, tmp_path / "w.pth", metadata={"format": "pt", "license": "MIT"})
    torch.save({"model": TIMM}, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert_taken(tmp_path / name, TIMM)


def test_arrays_by_name(tmp_path: Path) -> None:
    torch.save({"model": {k: v.numpy() for k, v in TIMM.items()}}, tmp_path / "w.pth")
    assert_taken(tmp_path / "w.pth", TIMM)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm_spec().build((224, 224)).model


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_archive_of_a_larger_network(tmp_path: Path) -> None:
    net = Net()
    net.backbone.load_state_dict(TIMM)
    holder = nn.Module()
    holder.backbone = nn.Module()
    for name, value in TIMM.items():
        place: nn.Module = holder.backbone
        *path, last = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, nn.Parameter(value))
    torch.jit.save(torch.jit.script(holder), tmp_path / "w.pt")
    assert_taken(tmp_path / "w.pt", TIMM)


class Watched:
    """Would leave a trace if it were rebuilt."""

    ran = False

    def __setstate__(self, state: Any) -> None:
        Watched.ran = True


def test_records_of_training_frameworks_do_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = type("CfgNode", (), {"__module__": "yacs.config"})
    module = ModuleType("yacs.config")
    module.CfgNode = record  # type: ignore[attr-defined]
    beside = record()
    beside.values = np.ones(3)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"cfg": beside, "log": [beside], "state_dict": TIMM}, tmp_path / "w.pth")
    assert_taken(tmp_path / "w.pth", TIMM)


@pytest.mark.parametrize(("write", "message"), [
    (lambda p: torch.save(Net(), p), r"it is a pickled module \(.*Net.*state_dict\(\)"),
    (lambda p: torch.save({"model": TIMM, "w": Watched()}, p), "nothing in it .*Watched"),
    (lambda p: torch.save({"optimizer": optimizer(TIMM), "epoch": 2}, p),
     "the file holds the state of an optimizer .* no model"),
    (lambda p: torch.save(optimizer(TIMM), p), "the file holds the state of an optimizer"),
    (lambda p: torch.save(
        {f"base.blocks.{i}.attn.qkv.lora_{x}.weight": torch.ones(2, 32)
         for i in range(2) for x in "AB"}, p), "low-rank updates alone .*merge_and_unload"),
    (lambda p: torch.save({"model": CLIP}, p), 'CLIP or open_clip .*name = "open_clip"'),
    (lambda p: torch.save(
        {"m.layer1.0.conv1.weight": torch.ones(4, 4, 1, 1), "m.fc.bias": torch.ones(3)}, p),
     "a ResNet"),
    (lambda p: torch.save(
        {"embeddings.patch_embeddings.projection.weight": torch.ones(4, 3, 2, 2)}, p),
     'in the naming of transformers .*name = "transformers"'),
    (lambda p: torch.save({k: v[..., :1] for k, v in TIMM.items()}, p), "of another shape"),
    (lambda p: torch.save({k: (v * 9).to(torch.int8) for k, v in TIMM.items()}, p), "quantized"),
    (lambda p: save_file({"model.encoder.adapters.0.w": torch.ones(2)}, p,
                         metadata={"format": "mfuser-1"}), "a checkpoint of this project"),
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
     "a pointer of Git LFS.*git lfs pull"),
    (lambda p: p.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "a web page"),
    (lambda p: p.write_text('{"weight_map": {"a": "model-1.safetensors"}}'), "index of 1 files"),
    (lambda p: np.save(p.open("wb"), np.ones(3)), "a NumPy file"),
    (lambda p: p.write_bytes(b"GGUF" + bytes(40)), "a GGUF file"),
    (lambda p: p.write_bytes(b""), r"truncated or not a weights file \(0 bytes"),
])  # fmt: skip
def test_what_is_no_backbone_is_named_for_what_it_is(
    write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "w.pth")
    with pytest.raises(MFuserError, match=message) as refused:
        held(tmp_path / "w.pth")
    assert "\n" not in str(refused.value) and not Watched.ran


def test_a_larger_one_of_the_family_is_described(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = TimmSpec(
        model="vit_tiny_patch16_224",
        weights="random",
        options={**OPTIONS, "depth": 3, "embed_dim": 48},
    ).build((224, 224))
    torch.save({"state_dict": prefixed(large.model.state_dict(), "m.")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="of width 48 with 3 blocks and patches of 16"):
        held(tmp_path / "w.pth")
