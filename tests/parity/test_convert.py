"""Released files -> ours: every key accounted for, and what is not a released file is refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mfuser import MFuserError, PairingSpec, load_registry
from mfuser.engine.checkpoints import load_model, load_released
from mfuser.errors import CheckpointError
from mfuser.model.assembly import unfilled
from mfuser.released import recognize, translate
from mfuser.released.files import read_released

META = {
    "mmseg_version": "0.20.2",
    "iter": 20000,
    "config": "model = dict()",
    "PALETTE": [[1, 2, 3]],
}


def inline(value: Any) -> str:
    """A value as TOML; tables without what is None."""
    if isinstance(value, dict):
        inside = ", ".join(f"{k} = {inline(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}"
    return json.dumps(value)


@pytest.fixture
def registry_file(tmp_path: Path, reference: ModuleType) -> Callable[..., Path]:
    def write(kind: str, **changes: Any) -> Path:
        table = reference.spec(kind, **changes)
        path = tmp_path / "registry.toml"
        lines = [f"{k} = {inline(v)}" for k, v in table.items()]
        streets = ["[dataset.toy]", 'name = "streets"', "size = [64, 96]", 'domain = "night"']
        path.write_text("\n".join([f"[pairing.{kind}]", *lines, *streets]) + "\n", "utf-8")
        return path

    return write


def save(path: Path, state: dict[str, Any], **more: Any) -> Path:
    torch.save({"meta": {**META, **more}, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("kind", ["eva", "clip", "siglip"])
def test_converted_file_is_all_that_is_needed(
    kind: str,
    reference: ModuleType,
    registry_file: Callable[..., Path],
    mfuser: Callable[..., Any],
    tmp_path: Path,
) -> None:
    # Real tags in place of "random": they are not there, and must not be looked for.
    table = reference.spec(kind)
    vlm = {
        **table["vlm"],
        "weights": {"eva": "merged2b_s6b_b61k", "clip": "openai"}.get(kind, "webli"),
    }
    registry = registry_file(kind, vlm=vlm, vfm={**table["vfm"], "weights": "lvd142m"})
    state = reference.state(kind)
    file = save(tmp_path / "iter_20000.pth", state, CLASSES=reference.NAMES)
    out = tmp_path / "made" / "model.safetensors"
    result = mfuser(
        "convert", file, "--pairing", kind, "--out", out, "--registry", registry,
        "--source", "gta", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    account = json.loads(result.out)
    unused = {key for keys in account["unused"].values() for key in keys}
    assert account["kind"] == kind
    assert account["keys"] == account["mapped"] + len(unused) == len(state)
    expected = {"backbone.dinov2.mask_token"}
    expected |= {k for k in state if "rope" in k or k == "random_text"}
    expected |= {k for k in state if kind == "siglip" and "adapter_proj" in k}
    assert unused == expected

    model, checkpoint = load_model(out, load_registry())
    assert checkpoint.step == 20000 and checkpoint.meta["complete"] is True
    recipe = "paper-clip" if kind == "clip" else "paper"
    assert checkpoint.meta["run"]["recipe_name"] == recipe
    size = reference.SIZES[kind]["image"]
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        again = load_released(state, PairingSpec.model_validate(reference.spec(kind)))
        # Tensors in a mapped file lie elsewhere in memory, and are added up in another order.
        assert torch.allclose(model.segment(images), again.segment(images), rtol=1e-4, atol=1e-5)

    pixels = np.random.default_rng(0).integers(0, 255, (size, size + 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    masks = tmp_path / "masks"
    result = mfuser("predict", out, tmp_path / "photo.png", "--out", masks, "--json")
    assert result.code == 0, result.err
    predicted = np.array(Image.open(masks / "photo.mask.png"))
    wanted = model.segment(torch.from_numpy(pixels).permute(2, 0, 1))[0].argmax(0)
    assert np.array_equal(predicted, wanted.numpy())
    if kind == "eva":
        result = mfuser(
            "evaluate", out, "--targets", "toy", "--limit", 1, "--device", "cpu",
            "--registry", registry, "--json",
        )  # fmt: skip
        assert result.code == 0, result.err
        report = json.loads(result.out)
        assert report["protocol"]["source"] == "gta" and report["protocol"]["steps"] == 20000


def test_half_precision_files_are_cast(reference: ModuleType, tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in reference.state("eva").items()}
    read = read_released(save(tmp_path / "half.pth", {f"module.{k}": v for k, v in state.items()}))
    assert read.state.keys() == state.keys() and read.step == 20000 and read.classes is None
    model = load_released(read.state, PairingSpec.model_validate(reference.spec("eva")))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_misfit_is_listed(reference: ModuleType) -> None:
    spec = PairingSpec.model_validate(reference.spec("siglip"))
    state = reference.state("siglip")
    del state["backbone.encoder.layers.2.self_attn.k_proj.weight"]
    del state["gamma"]
    state["backbone.surprise"] = torch.zeros(2)
    state["decode_head.query_embed.weight"] = torch.zeros(4, 32)
    state["backbone.embeddings.position_embedding.weight"] = torch.zeros(25, 64)
    with pytest.raises(CheckpointError) as caught:
        load_released(state, spec)
    text = str(caught.value)
    for part in (
        "2 missing: ",
        "backbone.encoder.layers.2.self_attn.k_proj.weight",
        "gamma",
        "1 unexpected: backbone.surprise",
        "2 of another shape: ",
        "decode_head.query_embed.weight is 4x32, for decoder.query_embed.weight 5x32",
        "backbone.embeddings.position_embedding.weight is 25x64",
        "give the image_size",
    ):
        assert part in text


def test_any_single_change_is_noticed(reference: ModuleType) -> None:
    """Whatever key is dropped, renamed or cut, it is named, unless it is one that is unused."""
    state = reference.state("clip")
    model = unfilled(PairingSpec.model_validate(reference.spec("clip")))
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    rng = random.Random(0)
    marks = {
        "backbone.class_embedding",
        "backbone.dinov2.cls_token",
        "decode_head.query_embed.weight",
    }
    free = marks | {"backbone.dinov2.mask_token", "backbone.fpn1.1.num_batches_tracked"}
    for key in rng.sample(sorted(state.keys() - free), 40):
        for change in ("drop", "rename", "cut"):
            changed = dict(state)
            value = changed.pop(key)
            if change == "rename":
                changed[f"{key}x"] = value
            elif change == "cut":
                changed[key] = value[:0] if value.dim() else value[None]
            with pytest.raises(CheckpointError) as caught:
                translate(changed, shapes, recognize(changed))
            assert key in str(caught.value)


@pytest.mark.parametrize("kind", ["eva", "clip"])
def test_one_tower_of_tqdm(kind: str, reference: ModuleType) -> None:
    """tqdm's checkpoints: the same tower and decoder, without DINOv2, adapters and enhancer."""
    table = reference.spec(kind, enhancer="none", fusion="none")
    del table["vfm"], table["merge"]
    away = ("backbone.dinov2", "backbone.adapter", "context_decoder", "gamma", "backbone.fpn")
    full = reference.state(kind)
    state = {k: v for k, v in full.items() if not k.startswith(away)}
    width, vfm = reference.SIZES[kind]["vlm"], reference.SIZES[kind]["vfm"]
    for name, tensor in full.items():
        if name.startswith("backbone.fpn"):
            half = tensor[:width] if tensor.dim() else tensor
            state[name] = half[:, :width] if half.dim() == 4 else half
        elif name.startswith("decode_head") and tensor.shape[1:2] == (width + vfm,):
            state[name] = tensor[:, :width]
    model = load_released(state, PairingSpec.model_validate(table))
    size = reference.SIZES[kind]["image"]
    scores = model.segment(torch.rand(1, 3, size, size))
    assert scores.shape == (1, 5, size, size) and scores.std() > 0


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_other_files_are_refused(
    reference: ModuleType,
    registry_file: Callable[..., Path],
    mfuser: Callable[..., Any],
    inside: Path,
) -> None:
    registry = registry_file("eva")
    state = reference.state("eva")
    whole = save(inside / "whole.pth", state)
    (inside / "cut.pth").write_bytes(whole.read_bytes()[:-40_000])
    (inside / "text.pth").write_text("no checkpoint")
    (inside / "empty.pth").write_bytes(b"")
    torch.save({"state_dict": state, "extra": Evil()}, inside / "evil.pth")
    torch.save([1, 2], inside / "list.pth")
    torch.save({"state_dict": {}}, inside / "none.pth")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, inside / "other.pth")
    save(inside / "classes.pth", state, CLASSES=["sky", "road"])
    larger = dict(state)
    larger["backbone.pos_embed"] = torch.zeros(1, 26, 64)
    save(inside / "larger.pth", larger)
    expected = {
        "absent.pth": "there is no checkpoint",
        "cut.pth": "cut off or no checkpoint",
        "text.pth": "cut off or no checkpoint",
        "empty.pth": "cut off or no checkpoint",
        "evil.pth": "nothing in it is executed",
        "list.pth": "holds a list",
        "none.pth": "no tensors by name",
        "other.pth": "not in a known format",
        "classes.pth": "was trained on 2 classes, the pairing has 5 (sky for road",
        "larger.pth": "give the image_size",
    }
    for name, message in expected.items():
        out = inside / "out.safetensors"
        result = mfuser(
            "convert", inside / name, "--pairing", "eva", "--out", out, "--registry", registry
        )
        assert result.code == 2 and message in result.err, (name, result.err)
        assert "Traceback" not in result.err and not out.exists()
    assert not Path("pwned").exists()


def test_class_texts_may_come_after_the_conversion(
    reference: ModuleType,
    registry_file: Callable[..., Path],
    mfuser: Callable[..., Any],
    inside: Path,
) -> None:
    """SigLIP's tokenizer has to be downloaded; without it the file is written all the same."""
    registry = registry_file("eva", prompt={"context": 8, "slots": 5})
    file = save(inside / "a.pth", reference.state("eva"))
    out = inside / "a.safetensors"
    result = mfuser("convert", file, "--pairing", "eva", "--out", out, "--registry", registry)
    assert result.code == 0 and "no class texts yet" in result.out
    Image.new("RGB", (56, 56)).save(inside / "photo.png")
    result = mfuser("predict", out, inside / "photo.png")
    assert result.code == 2 and "--set vlm.tokenizer=FOLDER" in result.err
    ids = reference.class_ids("eva").tolist()
    result = mfuser("predict", out, inside / "photo.png", "--set", f"prompt.ids={ids}")
    assert result.code == 0, result.err


def test_another_kind_than_the_pairing_is_refused(
    reference: ModuleType, registry_file: Callable[..., Path], tmp_path: Path
) -> None:
    registry = load_registry(registry_file("clip"))
    with pytest.raises(MFuserError, match="EVA02-CLIP and DINOv2.*does not fit this pairing"):
        load_released(reference.state("eva"), registry.pairing("clip"))


def test_numpy_scores_in_the_metadata_are_read(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2)}
    meta = {"hook_msgs": {"best_score": np.float64(0.5), "n": np.int64(3)}}
    file = save(tmp_path / "scores.pth", state, **meta)
    assert read_released(file).state.keys() == {"a"}
    torch.save({"state_dict": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_released(tmp_path / "old.pth").state.keys() == {"a"}


@pytest.mark.parametrize("wrap", [
    lambda s: {"meta": META, "state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    lambda s: {"model": {"state_dict": s}, "optimizer": {"state": {0: {"exp_avg": s["gamma"]}}}},
    lambda s: {"model_ema": {f"model.{k}": v for k, v in s.items()}, "epoch": 1},
])  # fmt: skip
def test_released_files_are_unwrapped(wrap: Any, reference: ModuleType, tmp_path: Path) -> None:
    state = reference.state("eva")
    torch.save(wrap(state), tmp_path / "w.pth")
    read = read_released(tmp_path / "w.pth").state
    assert read.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in read.items())
