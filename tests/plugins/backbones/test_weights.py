"""Files that are broken, hostile or of another architecture."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mfuser import WeightsError
from mfuser.weightfiles.torchscript import read_torchscript
from mfuser_plugins.backbones._weights import local_file, read_tensors
from mfuser_plugins.backbones.open_clip import OpenClipSpec
from mfuser_plugins.backbones.timm import TimmSpec

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4}
MODEL = "vit_tiny_patch16_224"


def spec(path: Path | str, model: str = MODEL, **options: Any) -> TimmSpec:
    return TimmSpec(model=model, weights=str(path), options={**SMALL, **options})


def state(model: str = MODEL, side: int = 224) -> dict[str, Tensor]:
    torch.manual_seed(0)
    backbone = spec("random", model, img_size=side).build((side, side))
    return {k: v.clone() for k, v in backbone.model.state_dict().items()}


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s},
    lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}},
    lambda s: {**s, "mask_token": torch.zeros(1, 64), "head.weight": torch.zeros(9, 64)},
])  # fmt: skip
def test_official_wrappers_are_taken_off(wrap: Any, tmp_path: Path) -> None:
    wanted = state()
    torch.save(wrap(wanted), tmp_path / "w.pth")
    held = spec(tmp_path / "w.pth").build((224, 224)).model.state_dict()
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[k], v) for k, v in wanted.items())


def test_half_precision_is_read(tmp_path: Path) -> None:
    wanted = {k: v.half() for k, v in state().items()}
    save_file(wanted, tmp_path / "w.safetensors")
    held = spec(tmp_path / "w.safetensors").build((224, 224)).model.state_dict()
    assert all(torch.equal(held[k], v.float()) for k, v in wanted.items())


def test_a_file_of_another_size_is_resampled_in_the_asked_convention(tmp_path: Path) -> None:
    large = state(side=320)
    save_file(large, tmp_path / "w.safetensors")
    backbone = spec(tmp_path / "w.safetensors").build((320, 320))
    assert torch.equal(backbone.model.state_dict()["pos_embed"], large["pos_embed"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    save_file(state(), path) if suffix == ".safetensors" else torch.save(state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match=rf"w{suffix} cannot be read: it is truncated"):
        read_tensors(path)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state_dict": state(), "extra": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match="holds more than tensors, and nothing in it is executed"
    ):
        spec(tmp_path / "w.pth").build((224, 224))
    assert not (tmp_path / "executed").exists()


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        self.table = nn.Parameter(torch.randn(4, 2).half())
        self.shared = self.table[1:]
        self.register_buffer("count", torch.tensor([1, 2]))
        self.scale = 2.5

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale + self.count


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_archives_are_read_without_their_program(tmp_path: Path) -> None:
    module = Scripted()
    torch.jit.save(torch.jit.script(module), tmp_path / "w.pt")
    tensors = read_tensors(tmp_path / "w.pt")
    assert tensors.pop("shared").tolist() == module.table[1:].tolist()
    assert tensors.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        assert tensors[key].dtype == value.dtype and torch.equal(tensors[key], value)


def test_a_torchscript_archive_that_names_other_code(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps(os.getcwd))
    with pytest.raises(pickle.UnpicklingError, match="unsupported global .*getcwd"):
        read_torchscript(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, "text", {"state_dict": {"a": 1}}])
def test_files_without_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="no named tensors"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize(("change", "message"), [
    ({"depth": 3}, r"12 missing \(blocks.2.attn.proj.bias, .*, …\). It belongs to another"),
    ({"depth": 1}, r"12 unexpected \(blocks.1.attn.proj.bias"),
    ({"embed_dim": 128}, r"of another shape \(.* instead of "),
])  # fmt: skip
def test_files_of_another_architecture(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message):
        spec(tmp_path / "w.safetensors", **change).build((224, 224))


def test_a_file_of_another_family(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    for model in ("eva02_tiny_patch14_224", "beitv2_base_patch16_224"):
        with pytest.raises(WeightsError, match="architecture"):
            spec(tmp_path / "w.safetensors", model).build((224, 224))


def put(cache: Path, repository: str, name: str, tensors: dict[str, Tensor]) -> None:
    """A folder as `hf download` leaves it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    if name.endswith(".safetensors"):
        save_file(tensors, snapshot / name)
    else:
        torch.save(tensors, snapshot / name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_published_weights_come_from_the_cache(name: str, cache: Path) -> None:
    tag = "vit_tiny_patch16_224.augreg_in21k"
    wanted = state()
    for again in (
        TimmSpec(model=tag, options=SMALL),
        TimmSpec(model=MODEL, weights="augreg_in21k", options=SMALL),
    ):
        with pytest.raises(WeightsError, match=f"HF_HUB_OFFLINE is set.*hf download timm/{tag}"):
            again.build((224, 224))
    put(cache, f"timm/{tag}", name, {**wanted, "head.weight": torch.zeros(21843, 64)})
    for again in (
        TimmSpec(model=tag, options=SMALL),
        TimmSpec(model=MODEL, weights="augreg_in21k", options=SMALL),
    ):
        backbone = again.build((224, 224))
        held = backbone.model.state_dict()
        assert all(torch.equal(held[k], v) for k, v in wanted.items())
        assert backbone.license == "apache-2.0"


def test_open_clip_tags_come_from_the_cache(cache: Path) -> None:
    options = {
        "embed_dim": 32, "vision_cfg": {"width": 64, "layers": 1, "head_width": 16},
        "text_cfg": {"width": 32, "heads": 2, "layers": 1},
    }  # fmt: skip
    source = OpenClipSpec(model="ViT-B-16", weights="random", options=options).build((224, 224))
    wanted = {k: v.clone() for k, v in source.model.state_dict().items()}
    tagged = OpenClipSpec(model="ViT-B-16", weights="laion2b_s34b_b88k", options=options)
    with pytest.raises(WeightsError, match="hf download laion/CLIP-ViT-B-16-laion2B-s34B-b88K"):
        tagged.build((224, 224))
    put(cache, "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "open_clip_model.safetensors", wanted)
    held = tagged.build((224, 224)).model.state_dict()
    assert all(torch.equal(held[k], v) for k, v in wanted.items())


def test_paths_and_tags_are_told_apart(tmp_path: Path) -> None:
    assert local_file("lvd142m") is None
    (tmp_path / "w.pth").touch()
    assert local_file(str(tmp_path / "w.pth")) == tmp_path / "w.pth"
    for missing in ("w.safetensors", "folder/weights", "~/nowhere/w.pt"):
        with pytest.raises(WeightsError, match="no such file"):
            local_file(missing)
    with pytest.raises(WeightsError, match="a folder, not a file"):
        local_file(str(tmp_path))
