"""From a folder of photographs and masks to a model elsewhere, under whatever names files have."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd import odd_files
from PIL import Image

from mfuser import load_registry

CLASSES = ("sky", "grass", "path", "shed", "tree")
NAMES = [
    os.fsdecode(name)
    for name in (
        b"caf\xe9", "ünï 😀".encode(), b"new\nline", b"-dash", b"quote'\"`$(x)", b"<b>&amp;",
        b"x" * 180, b"end ", b"[red]rich", b"%s{0}\\", b"\xff\xfe", b"tab\tname", b"a,b;c",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/images and photos/masks, five classes; next to it a registry of tiny pairings."""
    root = tmp_path_factory.mktemp("first-day")
    for part in ("images", "masks"):
        (root / "photos" / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in NAMES:
        label = rng.integers(0, 5, (8, 12)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
        image = (label[..., None] * [40, 20, 50]).astype(np.uint8)
        Image.fromarray(image).save(root / "photos/images" / f"{name}.jpg")
        Image.fromarray(label).save(root / "photos/masks" / f"{name}.png")
    return root


def test_five_commands(
    mfuser: Any, folder: Path, tiny_toml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs mfuser[export]")
    (folder / "registry.toml").write_text(tiny_toml)
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Any:
        done = mfuser(*arguments)
        assert done.code == 0 and "Traceback" not in done.err, done.err
        return done

    few = ["--steps", 2, "--set-recipe", "batch_size=1", "--set-recipe", "workers=0"]
    names = ",".join(CLASSES)
    run("data", "new", "photos", "--name", "garden", "--classes", names, "--pairing", "plain")
    checked = json.loads(run("data", "check", "garden", "--full", "--json").out)
    run("train", "garden", *few)
    written = json.loads(run("predict", "runs/garden", "photos/images", "--json").out)
    run("export", "runs/garden")

    assert sum(entry["images"] for entry in checked) == len(NAMES)
    assert not any(entry["problems"] for entry in checked)
    images = {Path(entry["image"]).name for entry in written}
    assert images == {f"{name}.jpg" for name in NAMES}  # back from JSON, byte for byte
    for entry in written:
        with Image.open(entry["mask"]) as mask:
            assert mask.size == (120, 80) and np.asarray(mask).max() < 5
    report = json.loads(Path("runs/garden/report.json").read_text("utf-8"))
    assert report["classes"] == list(CLASSES)
    page = Path("runs/garden/report.html").read_text("utf-8")
    assert all(name in page for name in CLASSES)
    program = Path("runs/garden/model.onnx").read_bytes()
    assert all(name.encode() in program for name in CLASSES)
    drawn = run("visualize", "compare", "runs/garden", "--dataset", "garden", "--json").out
    assert Path(json.loads(drawn)["sheets"][0]).is_file()


def test_training_data_of_every_kind(
    mfuser: Any, inside: Path, tiny_toml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset's own kinds are read, broken ones named once each, others not looked at."""
    monkeypatch.setattr("mfuser.cli.data.SLOTS", 8)
    odd = odd_files(Path("data/images"))
    Path("data/images/pipe.png").unlink()
    known = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
    used = [n for n in (*odd.usable, *odd.small, *odd.broken) if n.lower().endswith(known)]
    Path("data/masks").mkdir()
    for name in used:
        size = (120, 80)
        if name in odd.small:
            with Image.open(Path("data/images") / name) as image:
                size = image.size
        label = np.arange(size[0] * size[1]).reshape(size[::-1]) // 40 % 3
        stem = name.rpartition(".")[0]
        Image.fromarray(label.astype(np.uint8)).save(f"data/masks/{stem}.png")
    Path("registry.toml").write_text(
        tiny_toml + '[data]\nodd = "data"\n[dataset.odd]\nname = "folder"\n'
        'classes = ["sky", "road", "car"]\n'
    )
    checked = mfuser("data", "check", "odd", "--full", "--json")
    assert checked.code == 2 and "Traceback" not in checked.err  # there are problems
    found = json.loads(checked.out)[0]
    assert found["images"] == len(used)
    broken = [name for name in odd.broken if name in used]
    told = " ".join(found["problems"])
    assert [told.count(f"images/{name}") for name in broken] == [1] * len(broken)
    train = ["train", "plain", "--recipe", "tiny", "--source", "odd", "--no-evaluate"]
    small = ["--set", "image_size=32", "--set-recipe", "augmentation.scale=[1.0, 1.0]"]
    stopped = mfuser(*train, *small, "--set-recipe", "batch_size=20", "--out", "a")
    assert stopped.code == 2 and "Traceback" not in stopped.err
    skip = ["--set-recipe", "on_bad_image=skip", "--set-recipe", "rare_classes=null"]
    done = mfuser(*train, *small, *skip, "--steps", 2, "--out", "b")
    assert "Traceback" not in done.err and done.code in (0, 2), done.err


def test_a_folder_that_toml_cannot_name(mfuser: Any, folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"f\xf6lder")
    shutil.copytree(folder / "photos", odd)
    done = mfuser("data", "new", odd, "--name", "odd", "--out", tmp_path / "registry.toml")
    assert done.code == 2 and "Traceback" not in done.err
    assert "is not UTF-8" in done.err and not (tmp_path / "registry.toml").exists()


def test_more_classes_than_a_mask_holds(mfuser: Any, write_registry: Any) -> None:
    names = ", ".join(f'"c{k}"' for k in range(256))
    registry = write_registry(f'[pairing.many]\nextends = "plain"\nclasses = [{names}]\n')
    done = mfuser("train", "many", "--recipe", "tiny", "--registry", registry)
    assert done.code == 2
    assert "'classes' has 256 names; a mask of 8 bits holds at most 255" in done.err
    with pytest.raises(Exception, match="256 names"):
        load_registry(registry).pairing("many")


def test_class_names_misspelt(
    mfuser: Any, inside: Path, write_registry: Any, trained: Path
) -> None:
    done = mfuser("predict", trained, "x.png", "--classes", "rode,sky,zebra")
    assert done.code == 2  # the image is looked for first
    Image.new("RGB", (96, 64)).save("x.png")
    done = mfuser("predict", trained, "x.png", "--classes", "rode,sky,zebra")
    assert done.code == 2 and "'rode' (did you mean 'road'?), 'zebra'; available:" in done.err
    registry = write_registry(
        '[pairing.wrong]\nextends = "plain"\nclasses = ["road", "skyy", "cars", "unicorn"]\n'
    )
    done = mfuser("train", "wrong", "--recipe", "tiny", "--steps", 1, "--no-evaluate",
                  "--registry", registry, "--out", inside / "run")  # fmt: skip
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert (
        "labels no 'skyy' (did you mean 'sky'?), 'cars' (did you mean 'car'?), so nothing" in said
    )
    assert "unicorn" not in said
