"""Whatever is wrong with what was given: exit code 2, one sentence, nothing written or lost."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

SWAP = """
from mfuser import FusionSpec, hookimpl
class SwapSpec(FusionSpec, name="{name}"):
    def build(self, vfm, vlm):
        return None
@hookimpl
def {hook}():
    return [SwapSpec]
"""


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else "folder"
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(mfuser: Any, inside: Path) -> Callable[..., str]:
    """Runs a command that must fail; returns the sentence it fails with."""

    def run(*arguments: object, contains: str) -> str:
        before = snapshot(inside)
        result = mfuser(*arguments)
        assert result.code == 2, result.err
        said = [line for line in result.err.splitlines() if line.startswith("mfuser: ")]
        rest = [line for line in result.err.splitlines() if not line.startswith("mfuser: ")]
        assert len(said) == 1 and not any("Error" in line for line in rest), result.err
        assert re.search(contains, said[0]), said[0]
        assert result.out == ""
        assert snapshot(inside) == before
        return str(said[0])

    return run


@pytest.fixture
def train(write_registry: Any) -> list[object]:
    return ["train", "plain", "--recipe", "tiny", "--registry", write_registry(), "--out", "run"]


def camvid(root: Path, size: tuple[int, int] = (96, 64), count: int = 3) -> Path:
    """A stand-in in the official encoding: images, labels of ids 0 to 11, a list."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        name = f"0016E5_{i:05d}.png"
        lines.append(f"{name} 0016E5 train")
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
        label = rng.integers(0, 12, (size[1], size[0]), np.uint8)
        Image.fromarray(label).save(root / "labels" / name)
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return root


# ---- registry

REGISTRY = [
    ("unknown pairing", "", "plaine", [], "no pairing is called 'plaine'; did you mean 'plain'"),
    (
        "unknown component",
        '[pairing.bad]\nextends = "plain"\nfusion = "mvfuse"',
        "bad",
        [],
        r"registry\.toml:\d+ \[pairing\.bad\]: fusion: .*'mvfuse'; did you mean 'mvfuser'",
    ),
    (
        "unknown key",
        '[pairing.bad]\nextends = "plain"\nfusion.eveny = 2',
        "bad",
        [],
        r"registry\.toml:\d+ \[pairing\.bad\]: fusion\.eveny: there is no .*'every'",
    ),
    (
        "wrong type",
        '[pairing.bad]\nextends = "plain"\nimage_size = "big"',
        "bad",
        [],
        r"registry\.toml:\d+ \[pairing\.bad\]: image_size: a size is one number or",
    ),
    (
        "wrong type",
        '[pairing.bad]\nextends = "plain"\nfusion.every = [1]',
        "bad",
        [],
        r"registry\.toml:\d+ \[pairing\.bad\]: fusion\.every = \[1\]: input should be a valid int",
    ),
    (
        "cycle in extends",
        '[pairing.a]\nextends = "b"\n[pairing.b]\nextends = "a"',
        "a",
        [],
        r"registry\.toml:\d+ \[pairing\.a\] extends: a circle: a -> b -> a",
    ),
    ("TOML", "[pairing.x\n", "plain", [], r"registry\.toml is not valid TOML: .*line \d+"),
    ("setting", "", "plain", ["--set", "fusion"], "--set fusion: write key=value"),
    ("setting", "", "plain", ["--set", "fusion.evry=1"], "--set: fusion.evry: .*every"),
    ("steps", "", "plain", ["--steps", "0"], "steps = 0: input should be greater than 0"),
    ("batch", "", "plain", ["--set-recipe", "batch_size=0"], "batch_size = 0: .*greater than 0"),
    ("recipe", "", "plain", ["--recipe", "tinny"], "no recipe is called 'tinny'; did you mean 'ti"),
    ("source", "", "plain", ["--source", "toyy"], "no dataset is called 'toyy'; did you mean 'toy"),
    ("targets", "", "plain", ["--targets", "toyy"], "no dataset is called 'toyy'; did you mean"),
    ("targets", "", "plain", ["--targets", ","], "--targets names no dataset"),
    ("depth", "", "plain", ["--set", "vfm.options.depth=0"], "vfm 'timm' has no blocks"),
    ("taps", "", "plain", ["--set", "taps=[0,0,0,9]"], r"\[pairing\.plain\]: taps .* go beyond"),
    ("slots", "", "plain", ["--set", "prompt.slots=1"], "'traffic light' takes 4 tokens"),
    ("context", "", "plain", ["--set", "prompt.context=99"], "99 context tokens .*prompt.context"),
    ("window", "", "plain", ["--set", "image_size=16"], "is below 32 pixels.*enlarge it"),
    ("crop", "", "plain", ["--set", "image_size=128"], "64x96, smaller than the crop of 128x128"),
    ("warm-up", "", "plain", ["--set-recipe", "warmup=9"], "warmup of 9 steps .*lower warmup"),
]


@pytest.mark.parametrize(("text", "pairing", "options", "message"), [r[1:] for r in REGISTRY])
def test_registry(
    refused: Any,
    write_registry: Any,
    text: str,
    pairing: str,
    options: list[str],
    message: str,
) -> None:
    registry = write_registry(text)
    base = ["train", pairing, "--recipe", "tiny", "--registry", registry, "--out", "run"]
    refused(*base, *options, contains=message)
    if not set(options) - {"--set"} and not options:
        refused("describe", pairing, "--registry", registry, contains=message)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (SWAP.format(name="swap", hook="mfuser_component"), "unknown hook 'mfuser_component'"),
        (SWAP.format(name="mvfuser", hook="mfuser_components"), "two plugins offer.*'mvfuser'"),
        ("raise ValueError('no')", "cannot be used: ValueError: no"),
        ("import nothing_of_that_name", "ModuleNotFoundError.*nothing_of_that_name"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_plugins(
    refused: Any, train: Any, write_registry: Any, inside: Path, code: str, message: str
) -> None:
    (inside / "swap.py").write_text(code)
    assert "swap.py" in refused(*train, "--plugin", "swap.py", contains=message)
    write_registry('[plugins]\nload = ["swap.py"]')
    refused(*train, contains=message)


# ---- weights


def test_weights(refused: Any, train: Any, inside: Path, tiny: Any) -> None:
    refused(
        *train, "--set", "vfm.weights=none.pth", contains="vfm 'timm': .*none.pth.*no such file"
    )
    backbone = tiny.pairing("plain").vfm.build((64, 96))
    good = {k.removeprefix("model."): v for k, v in backbone.state_dict().items()}
    save_file({k: v.contiguous() for k, v in good.items()}, inside / "good.safetensors")
    whole = (inside / "good.safetensors").read_bytes()
    (inside / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(*train, "--set", "vfm.weights=cut.safetensors", contains=r"cut\.safetensors.*truncated")
    torch.save(good, inside / "good.pth")
    (inside / "cut.pth").write_bytes((inside / "good.pth").read_bytes()[:9000])
    refused(*train, "--set", "vfm.weights=cut.pth", contains=r"cut\.pth")
    wide = ["--set", "vfm.options.embed_dim=48", "--set", "vfm.weights=good.safetensors"]
    refused(*train, *wide, contains=r"good\.safetensors")
    save_file({"layer.weight": torch.zeros(2, 2)}, inside / "other.safetensors")
    refused(*train, "--set", "vfm.weights=other.safetensors", contains=r"other\.safetensors")
    (inside / "empty.pth").write_bytes(b"")
    refused(*train, "--set", "vfm.weights=empty.pth", contains=r"empty\.pth")


# ---- checkpoints


def test_checkpoints(refused: Any, trained: Path, inside: Path, write_registry: Any) -> None:
    registry = ["--registry", write_registry()]
    shutil.copytree(trained, inside / "run")
    photo = inside / "photo.png"
    Image.new("RGB", (96, 64)).save(photo)
    whole = (inside / "run" / "model.safetensors").read_bytes()
    (inside / "run" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for command in (["evaluate", "run"], ["predict", "run", photo]):
        refused(*command, *registry, contains=r"run/model\.safetensors is not a whole safetensors")
    save_file({"a": torch.zeros(1)}, inside / "other.safetensors")
    refused("evaluate", "other.safetensors", *registry, contains="is not a checkpoint of this proj")
    refused("evaluate", "nowhere", *registry, contains="no run folder or checkpoint nowhere")
    (inside / "empty").mkdir()
    refused("predict", "empty", photo, *registry, contains="empty holds no run")
    # A checkpoint of another pairing put in its place.
    (inside / "run" / "model.safetensors").write_bytes(whole)
    resume = ["train", "plain", "--recipe", "tiny", "--out", "run", "--resume", *registry]
    refused(
        *resume, "--set", "pyramid.width=64", contains=r"another run: its pairing\.pyramid.*--out"
    )
    refused(*resume[:-3], *registry, contains="already holds a run .*--resume or choose another")


# ---- datasets


def test_missing_and_empty_folders(refused: Any, train: Any, inside: Path) -> None:
    source = [*train, "--source", "camvid", "--targets", "toy"]
    refused(
        *source,
        contains="the folder of dataset 'camvid' is not known: give --data-root camvid=FOLDER",
    )
    refused(*source, "--data-root", "camvid=nowhere", contains="camvid.*nowhere does not exist")
    (inside / "camvid").mkdir()
    refused(*source, "--data-root", ".", contains="camvid")
    (inside / "camvid" / "images").mkdir()
    (inside / "camvid" / "labels").mkdir()
    (inside / "camvid" / "list.txt").write_text("")
    refused(*source, "--data-root", ".", contains="camvid")
    target = [*train, "--targets", "cityscapes", "--data-root", "."]
    refused(*target, contains="cityscapes.*does not exist")


def spoil_label(root: Path) -> str:
    next((root / "labels").iterdir()).unlink()
    return r"0016E5_0000\d"


def spoil_size(root: Path) -> str:
    for path in (root / "labels").iterdir():
        Image.fromarray(np.zeros((60, 96), np.uint8)).save(path)
    return r"0016E5_0000\d\.png is 96x60, its image .* is 96x64"


def spoil_value(root: Path) -> str:
    for path in (root / "labels").iterdir():
        Image.fromarray(np.full((64, 96), 77, np.uint8)).save(path)
    return r"labels/0016E5_0000\d\.png holds the label value 77 .*the map knows 0 to 11"


def spoil_image(root: Path) -> str:
    for path in (root / "images").iterdir():
        path.write_bytes(path.read_bytes()[:2000])
    return r"images/0016E5_0000\d\.png cannot be read: "


def spoil_kind(root: Path) -> str:
    for path in (root / "images").iterdir():
        path.write_text("no picture")
    return r"images/0016E5_0000\d\.png cannot be read: it is not an image"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spoil", [spoil_label, spoil_size, spoil_value, spoil_image, spoil_kind])
def test_spoilt_datasets(
    refused: Any, train: Any, inside: Path, spoil: Callable[[Path], str], workers: int
) -> None:
    root = camvid(inside / "camvid")
    message = spoil(root)
    options = ["--source", "camvid", "--targets", "toy", "--data-root", "."]
    refused(*train, *options, "--set-recipe", f"workers={workers}", contains=message)


def test_spoilt_targets(
    refused: Any, trained: Path, inside: Path, write_registry: Any, mfuser: Any
) -> None:
    shutil.copytree(trained, inside / "run")
    registry = write_registry('[dataset.frames]\nname = "camvid"\nall_frames = true\n')
    root = camvid(inside / "camvid")
    broken = sorted((root / "images").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:2000])
    command = ["evaluate", "run", "--targets", "frames", "--data-root", ".", "--registry", registry]
    refused(*command, "--out", "report", "--limit", "3", contains=f"{broken.name} cannot be read")
    assert not (inside / "report").exists()


def test_an_image_smaller_than_the_crop(refused: Any, train: Any, inside: Path) -> None:
    camvid(inside / "camvid", size=(80, 60))
    options = ["--source", "camvid", "--targets", "toy", "--data-root", "."]
    refused(*train, *options, contains=r"is 60x80, smaller than the crop of 64x96.*image_size")


# ---- folders and options


@pytest.mark.parametrize("out", ["/proc/mfuser", "file", "file/below", "full"])
def test_output_folders(refused: Any, train: Any, inside: Path, out: str) -> None:
    (inside / "file").write_text("x")
    (inside / "full").mkdir()
    (inside / "full" / "notes.txt").write_text("x")
    refused(*train, "--out", out, contains=out + r".* (cannot be written|is not empty).*--out")


@pytest.mark.parametrize("out", ["/proc/mfuser", "file"])
def test_output_folders_of_evaluate_and_predict(
    refused: Any, trained: Path, inside: Path, write_registry: Any, out: str
) -> None:
    registry = ["--registry", write_registry()]
    (inside / "file").write_text("x")
    Image.new("RGB", (96, 64)).save(inside / "photo.png")
    for command in (["evaluate", trained], ["predict", trained, "photo.png"]):
        refused(*command, "--out", out, *registry, contains=f"the folder {out}.* cannot be written")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'"),
        (["train"], r"Missing argument 'PAIRING' \(see: mfuser train --help\)"),
        (["train", "demo", "--stepz", "3"], "no option '--stepz'; did you mean '--steps'"),
        (["train", "demo", "--steps", "x"], "'x' is not a valid integer"),
        (["train", "demo", "more"], "unexpected extra argument"),
        (["evaluate", "r", "--stride", "0"], "--stride.*0 is not in the range"),
        (["evaluate", "r", "--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (["predict", "r", "i.png", "--scale", "0"], "--scale"),
        (
            ["predict", "r", ".", "--scale", "nan"],
            "--scale takes a factor from 0.01 to 100, auto or fit, not nan",
        ),
        (["predict", "r"], "Missing argument"),
        (["list", "decoders"], "'decoders' is listed; did you mean 'decoder'"),
        (["list", "--registry", "none.toml"], "there is no registry file none.toml"),
        (["list", "--plugin", "none.py"], "there is no file none.py"),
        (["data", "chek"], "there is no command 'chek'; did you mean 'check'"),
        (["data", "check", "cityscape"], "no dataset is called 'cityscape'; did you mean 'citysca"),
        (["describe", "demo", "--set", "x"], "--set x: write key=value"),
    ],
)
def test_options(refused: Any, arguments: list[str], message: str) -> None:
    refused(*arguments, contains=message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(refused: Any, train: Any) -> None:
    refused(*train, "--device", "cuda", contains="--device cuda: torch sees no GPU here")


# ---- photographs


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "photo.png cannot be read: it is empty"),
        (lambda p: p.write_text("text"), "photo.png cannot be read: it is not an image"),
        (lambda p: p.mkdir(), "the folder photo.png holds no images"),
        (lambda p: Image.new("RGB", (1, 1)).save(p), "photo.png: .*1x1 .*smaller .*--scale"),
        (lambda p: Image.new("L", (95, 64)).save(p), "photo.png: .*64x95 .*smaller than the wind"),
        (lambda p: Image.new("F", (96, 64), 300).save(p, "TIFF"), "photo.png: float pixels from"),
        (lambda p: None, "there is no image or folder photo.png"),
    ],
)
def test_photographs(
    refused: Any,
    trained: Path,
    inside: Path,
    write_registry: Any,
    write: Callable[[Path], Any],
    message: str,
) -> None:
    Image.new("RGB", (96, 64)).save(inside / "good.png")
    write(inside / "photo.png")
    registry = ["--registry", write_registry()]
    # The good one comes first, and even so nothing is written.
    refused("predict", trained, "good.png", "photo.png", *registry, contains=message)


def test_the_json_of_an_error(mfuser: Any) -> None:
    result = mfuser("describe", "nothing", "--json")
    assert result.code == 2
    assert json.loads(result.out)["error"] in result.err
