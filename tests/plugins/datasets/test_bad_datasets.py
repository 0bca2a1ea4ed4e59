"""Faults of a dataset on disk, each named by the error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfuser import DataError, Dataset, DatasetSpec
from mfuser.data.images import UnreadableImage
from mfuser_plugins.datasets.acdc import AcdcSpec
from mfuser_plugins.datasets.bdd100k import Bdd100kSpec
from mfuser_plugins.datasets.camvid import CamvidSpec
from mfuser_plugins.datasets.cityscapes import CityscapesSpec
from mfuser_plugins.datasets.dark_zurich import DarkZurichSpec
from mfuser_plugins.datasets.gta import GtaSpec
from mfuser_plugins.datasets.idd import IddSpec
from mfuser_plugins.datasets.mapillary import MapillarySpec
from mfuser_plugins.datasets.muses import MusesSpec
from mfuser_plugins.datasets.synthia import SynthiaSpec
from mfuser_plugins.datasets.wilddash2 import WildDash2Spec

# Spec, image folder, image suffix, label folder, label suffix; the split is train.
LAYOUTS = [
    (CityscapesSpec(), "leftImg8bit/train", "_leftImg8bit.png", "gtFine/train",
     "_gtFine_labelIds.png"),
    (GtaSpec(), "images", ".png", "labels", ".png"),
    (SynthiaSpec(), "RGB", ".png", "GT/LABELS", ".png"),
    (Bdd100kSpec(), "images/10k/train", ".jpg", "labels/sem_seg/masks/train", ".png"),
    (MapillarySpec(), "training/images", ".jpg", "training/labels", ".png"),
    (AcdcSpec(condition="fog"), "rgb_anon/fog/train", "_rgb_anon.png", "gt/fog/train",
     "_gt_labelTrainIds.png"),
    (CamvidSpec(), "train", ".png", "trainannot", ".png"),
    (DarkZurichSpec(), "rgb_anon/train", "_rgb_anon.png", "gt/train", "_gt_labelTrainIds.png"),
    (MusesSpec(condition="fog"), "frame_camera/train/fog", "_frame_camera.png",
     "gt_semantic/train/fog", "_gt_labelTrainIds.png"),
    (IddSpec(), "leftImg8bit/train", "_leftImg8bit.png", "gtFine/train",
     "_gtFine_labelcsTrainIds.png"),
    (WildDash2Spec(), "images", ".jpg", "labels", ".png"),
]  # fmt: skip
EVERY = pytest.mark.parametrize(
    ("spec", "images", "image_suffix", "labels", "label_suffix"),
    LAYOUTS,
    ids=[layout[0].component() for layout in LAYOUTS],
)


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def one_pair(root: Path, label: np.ndarray) -> Dataset:
    write(root / "images/00001.png", image())
    write(root / "labels/00001.png", label)
    return GtaSpec().build(root, "train")


@EVERY
def test_missing_pieces(
    spec: DatasetSpec, images: str, image_suffix: str, labels: str, label_suffix: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    name = spec.component()
    with pytest.raises(DataError, match=rf"--data-root {name}=PATH.* MFUSER_DATA .*\[data\]"):
        spec.build(None, "train")
    with pytest.raises(DataError, match=rf"{name}: the folder .*nowhere does not exist"):
        spec.build(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=rf"{name}: .*does not exist .*holds nothing"):
        spec.build(tmp_path, "train")
    (tmp_path / images).mkdir(parents=True)
    with pytest.raises(DataError, match=rf"{name}: .*no folder of labels; .*{labels}\b"):
        spec.build(tmp_path, "train")
    (tmp_path / labels).mkdir(parents=True)
    with pytest.raises(DataError, match=rf"{name}: there is no image .* below .*{images}"):
        spec.build(tmp_path, "train")
    for i in range(5):
        write(tmp_path / images / f"x_{i}{image_suffix}", image())
    write(tmp_path / labels / f"x_4{label_suffix}", np.zeros((6, 9), np.uint8))
    write(tmp_path / labels / f"y{label_suffix}", np.zeros((6, 9), np.uint8))
    with pytest.raises(DataError) as error:
        spec.build(tmp_path, "train")
    assert f"{name}: 4 of 5 images" in str(error.value)
    assert f"x_0{image_suffix}, x_1{image_suffix}, x_2{image_suffix}, …" in str(error.value)
    assert f"{labels}/x_0{label_suffix}" in str(error.value)
    for i in range(4):
        write(tmp_path / labels / f"x_{i}{label_suffix}", np.zeros((6, 9), np.uint8))
    dataset = spec.build(tmp_path, "train")
    assert [dataset.name(i) for i in range(len(dataset))] == [f"x_{i}" for i in range(5)]


@EVERY
def test_val_is_not_made_up(
    spec: DatasetSpec, images: str, image_suffix: str, labels: str, label_suffix: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    write(tmp_path / images / f"x{image_suffix}", image())
    write(tmp_path / labels / f"x{label_suffix}", np.zeros((6, 9), np.uint8))
    assert len(spec.build(tmp_path, "train")) == 1
    with pytest.raises(DataError, match="val.* does not exist|outside the train split"):
        spec.build(tmp_path, "val")
    assert len(spec.model_copy(update={"split": "train"}).build(tmp_path, "val")) == 1
    with pytest.raises(DataError, match="no split 'test'"):
        spec.build(tmp_path, "test")


def test_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file, not a folder"):
        GtaSpec().build(tmp_path / "file", "train")


def test_label_of_another_size(tmp_path: Path) -> None:
    dataset = one_pair(tmp_path, np.zeros((4, 7), np.uint8))
    with pytest.raises(DataError, match=r"labels/00001.png is 7x4, .*images/00001.png is 9x6"):
        dataset[0]


def test_label_value_outside_the_map(tmp_path: Path) -> None:
    dataset = one_pair(tmp_path, np.full((6, 9), 77, np.uint8))
    with pytest.raises(DataError, match=r"labels/00001.png holds the label value 77 \(54 pixels\)"):
        dataset.label(0)


def test_color_label_where_an_index_is_due(tmp_path: Path) -> None:
    write(tmp_path / "images/10k/train/1.jpg", image())
    write(tmp_path / "labels/sem_seg/colormaps/train/1.png", image())
    with pytest.raises(DataError, match="1.png is a color picture, not a label"):
        Bdd100kSpec().build(tmp_path, "train").label(0)


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("size", [0, 20, 60])
def test_file_cut_short(tmp_path: Path, part: str, size: int) -> None:
    dataset = one_pair(tmp_path, np.random.default_rng(0).integers(0, 30, (6, 9), np.uint8))
    path = tmp_path / part / "00001.png"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UnreadableImage, match=f"{part}/00001.png cannot be read"):
        dataset[0]


def test_file_gone_after_listing(tmp_path: Path) -> None:
    dataset = one_pair(tmp_path, np.zeros((6, 9), np.uint8))
    (tmp_path / "images/00001.png").unlink()
    with pytest.raises(UnreadableImage, match="there is no file .*images/00001.png"):
        dataset[0]


def test_fingerprint_follows_names_sizes_and_times(tmp_path: Path) -> None:
    root = tmp_path / "a"
    first = one_pair(root, np.zeros((6, 9), np.uint8)).fingerprint()
    assert GtaSpec().build(root, "train").fingerprint() == first
    label = root / "labels/00001.png"
    state = label.stat()
    os.utime(label, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
    second = GtaSpec().build(root, "train").fingerprint()
    assert second != first
    root.rename(tmp_path / "b")
    assert GtaSpec().build(tmp_path / "b", "train").fingerprint() == second
    write(tmp_path / "b/images/00002.png", image())
    write(tmp_path / "b/labels/00002.png", np.zeros((6, 9), np.uint8))
    assert GtaSpec().build(tmp_path / "b", "train").fingerprint() != second
