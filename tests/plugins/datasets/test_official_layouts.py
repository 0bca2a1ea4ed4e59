"""The paper's datasets: each reader on a stand-in in the official layout and encoding."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from layouts import HEIGHT, WIDTH, ids, labels, write_image, write_label

from mfuser import IGNORE, DataError
from mfuser.config.classes import CITYSCAPES
from mfuser.plugins.discovery import components
from mfuser_plugins.datasets.acdc import AcdcSpec
from mfuser_plugins.datasets.bdd100k import Bdd100kSpec
from mfuser_plugins.datasets.cityscapes import CityscapesSpec
from mfuser_plugins.datasets.gta import GtaSpec
from mfuser_plugins.datasets.mapillary import V12_START, MapillarySpec
from mfuser_plugins.datasets.synthia import SynthiaSpec


def test_all_are_offered() -> None:
    names = {"gta", "synthia", "cityscapes", "bdd100k", "mapillary", "acdc", "camvid"}
    names |= {"urbansyn", "dark_zurich", "nighttime_driving", "muses", "idd", "wilddash2", "bravo"}
    assert names <= set(components("dataset"))


def test_cityscapes(tmp_path: Path) -> None:
    for city, values in (("aachen", (7, 33, 0)), ("ulm", (26, 31, 34))):
        key = f"train/{city}/{city}_000000_000019"
        write_image(tmp_path / f"leftImg8bit/{key}_leftImg8bit.png")
        write_label(tmp_path / f"gtFine/{key}_gtFine_labelIds.png", ids(*values))
        write_label(tmp_path / f"gtFine/{key}_gtFine_instanceIds.png", ids(1, 2))
        write_label(tmp_path / f"gtFine/{key}_gtFine_labelTrainIds.png", ids(3))
    dataset = CityscapesSpec().build(tmp_path, "train")
    assert labels(dataset) == [[0, 18, IGNORE], [13, 16, IGNORE]]
    assert dataset.name(1) == "ulm_000000_000019"
    assert dataset.class_ids == tuple(range(19)) and dataset.classes == CITYSCAPES.names
    assert dataset.test_size is None


def test_cityscapes_train_ids_serve_where_the_official_labels_are_absent(tmp_path: Path) -> None:
    write_image(tmp_path / "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png")
    write_label(tmp_path / "gtFine/val/ulm/ulm_1_gtFine_labelTrainIds.png", ids(0, 18, 255))
    assert labels(CityscapesSpec(split="val").build(tmp_path, "train")) == [[0, 18, IGNORE]]


def gta_palette() -> list[tuple[int, int, int]]:
    return [((i * 7) % 256, (i * 13) % 256, (i * 29) % 256) for i in range(35)]


def test_gta_palette_index_is_the_id_whatever_its_color(tmp_path: Path) -> None:
    write_image(tmp_path / "images/00001.png")
    write_label(tmp_path / "labels/00001.png", ids(7, 26, 34, 4), gta_palette())
    assert labels(GtaSpec().build(tmp_path, "train")) == [[0, 13, IGNORE]]


def test_gta_rgb_label_is_mapped_by_color(tmp_path: Path) -> None:
    write_image(tmp_path / "images/00001.png")
    colors = np.array([*CITYSCAPES.colors, (0, 0, 0), (150, 120, 90)], np.uint8)
    write_label(tmp_path / "labels/00001.png", colors[ids(*range(21))])
    label = GtaSpec().build(tmp_path, "train").label(0)
    assert (label == np.where(ids(*range(21)) < 19, ids(*range(21)), IGNORE)).all()
    write_label(tmp_path / "labels/00001.png", colors[ids(0)] + np.uint8(1))
    with pytest.raises(DataError, match=r"00001.png holds the color \[129, 65, 129\]"):
        GtaSpec().build(tmp_path, "train").label(0)


def test_gta_leftovers_and_converted(tmp_path: Path) -> None:
    for stem in ("00001", "00002"):
        write_image(tmp_path / f"images/{stem}.png")
        write_label(tmp_path / f"labels/{stem}_labelTrainIds.png", ids(5))
    write_label(tmp_path / "labels/00001.png", ids(7), gta_palette())
    write_label(tmp_path / "images/00001_labelTrainIds.png", ids(5))
    write_label(tmp_path / "images/._00001.png", ids(5))
    assert labels(GtaSpec().build(tmp_path, "train")) == [[0], [5]]


def test_gta_known_unequal_pairs_are_left_out(tmp_path: Path) -> None:
    for stem in ("00001", "12160", "12166"):
        write_image(tmp_path / f"images/{stem}.png")
        write_label(tmp_path / f"labels/{stem}.png", ids(7), gta_palette())
    write_label(tmp_path / "labels/12160.png", ids(7)[:4], gta_palette())
    dataset = GtaSpec().build(tmp_path, "train")
    assert [dataset.name(i) for i in range(len(dataset))] == ["00001", "12166"]


@pytest.mark.parametrize("labels_at", ["labels/train", "labels"])
def test_gta_split_folders_of_the_users_own(tmp_path: Path, labels_at: str) -> None:
    write_image(tmp_path / "images/train/00001.png")
    write_label(tmp_path / labels_at / "00001.png", ids(7))
    write_image(tmp_path / "images/valid/00002.png")
    write_label(tmp_path / labels_at.replace("train", "valid") / "00002.png", ids(8))
    assert labels(GtaSpec().build(tmp_path, "train")) == [[0]]
    assert labels(GtaSpec().build(tmp_path, "val")) == [[1]]


@pytest.mark.parametrize("below", ["", "RAND_CITYSCAPES"])
def test_synthia_class_is_the_red_channel_of_16_bits(tmp_path: Path, below: str) -> None:
    root = tmp_path / below
    write_image(root / "RGB/0000000.png")
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint16)
    rgb[..., 0] = ids(3, 22, 11, 21, 10)
    rgb[..., 1] = 301  # instance ids need more than 8 bits
    path = root / "GT/LABELS/0000000.png"
    path.parent.mkdir(parents=True)
    assert cv2.imwrite(str(path), rgb[..., ::-1])  # OpenCV writes BGR
    write_label(root / "GT/LABELS/0000000_labelTrainIds.png", ids(6))
    dataset = SynthiaSpec().build(tmp_path, "train")
    assert labels(dataset) == [[0, 3, 11, 18, IGNORE]]
    assert len(dataset.class_ids) == 16


def test_synthia_label_saved_again_in_8_bits_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "RGB/0000000.png")
    write_label(tmp_path / "GT/LABELS/0000000.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(DataError, match="0000000.png has 8 bits per channel"):
        SynthiaSpec().build(tmp_path, "train").label(0)


@pytest.mark.parametrize("folder", ["masks", "colormaps"])
def test_bdd100k(tmp_path: Path, folder: str) -> None:
    write_image(tmp_path / "images/10k/val/0a-1.jpg")
    # A palette whose colors would be other classes if they were read as such.
    palette = [*reversed(CITYSCAPES.colors)] if folder == "colormaps" else None
    write_label(tmp_path / f"labels/sem_seg/{folder}/val/0a-1.png", ids(0, 18, 255), palette)
    write_image(tmp_path / "images/100k/val/other.jpg")
    assert labels(Bdd100kSpec().build(tmp_path, "val")) == [[0, 18, IGNORE]]
    with pytest.raises(DataError, match='images/10k/val does; set split = "val"'):
        Bdd100kSpec().build(tmp_path, "train")


@pytest.mark.parametrize("below", ["bdd100k/seg", "seg", "."])
def test_bdd100k_older_releases(tmp_path: Path, below: str) -> None:
    write_image(tmp_path / below / "images/train/1.jpg")
    write_label(tmp_path / below / "labels/train/1_train_id.png", ids(4))
    assert labels(Bdd100kSpec().build(tmp_path, "train")) == [[4]]


def write_mapillary(root: Path, where: str, palette: list[tuple[int, int, int]]) -> None:
    write_image(root / "validation/images/a_b.jpg")
    write_label(root / f"validation/{where}/a_b.png", ids(13, 41, 44, 65), palette)


V12_PALETTE = [*V12_START, *[(i, 0, 0) for i in range(61)]]
V20_PALETTE = [(165, 42, 42), (0, 192, 0), (250, 170, 31), *[(i, 1, 0) for i in range(121)]]


@pytest.mark.parametrize("where", ["labels", "v1.2/labels"])
def test_mapillary_both_mappings(tmp_path: Path, where: str) -> None:
    write_mapillary(tmp_path, where, V12_PALETTE)
    dgss = MapillarySpec().build(tmp_path, "val")
    robustnet = MapillarySpec(mapping="robustnet").build(tmp_path, "val")
    assert dgss.label(0)[0, :4].tolist() == [0, IGNORE, 5, IGNORE]
    assert robustnet.label(0)[0, :4].tolist() == [0, 0, IGNORE, IGNORE]
    assert dgss.test_size == (2048, 1024)
    assert dgss.fingerprint() != robustnet.fingerprint()
    assert labels(dgss) == [[0, 5, IGNORE]]


def test_mapillary_converted(tmp_path: Path) -> None:
    write_image(tmp_path / "training/images/a.jpg")
    write_label(tmp_path / "training/labels/a_labelTrainIds.png", ids(11))
    assert labels(MapillarySpec().build(tmp_path, "train")) == [[11]]


def test_mapillary_v2_is_refused(tmp_path: Path) -> None:
    write_mapillary(tmp_path, "v2.0/labels", V20_PALETTE)
    with pytest.raises(DataError, match=r"v2\.0 is there, .*v1\.2/labels is not"):
        MapillarySpec().build(tmp_path, "val")
    write_mapillary(tmp_path, "labels", V20_PALETTE)
    with pytest.raises(DataError, match=r"a_b.png has the palette of another version"):
        MapillarySpec().build(tmp_path, "val")
    (tmp_path / "config.json").write_text(json.dumps({"labels": [{}] * 124}))
    with pytest.raises(DataError, match=r"config.json lists 124 labels"):
        MapillarySpec().build(tmp_path, "val")
    (tmp_path / "config.json").write_text(json.dumps({"labels": [{}] * 66}))
    assert len(MapillarySpec().build(tmp_path, "val")) == 1
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json has no list 'labels'"):
        MapillarySpec().build(tmp_path, "val")


def test_mapillary_value_of_v2_is_named(tmp_path: Path) -> None:
    write_mapillary(tmp_path, "v1.2/labels", V12_PALETTE)
    write_label(tmp_path / "validation/v1.2/labels/a_b.png", ids(123))
    with pytest.raises(DataError, match=r"value 123 .* v2\.0 has 124 labels"):
        MapillarySpec().build(tmp_path, "val").label(0)


def write_acdc(root: Path, condition: str, split: str, value: int, suffix: str) -> None:
    key = f"{condition}/{split}/GOPR0475/GOPR0475_frame_000041"
    write_image(root / f"rgb_anon/{key}_rgb_anon.png")
    write_label(root / f"gt/{key}_gt_{suffix}.png", ids(value, 255))


def test_acdc_is_one_domain_per_condition(tmp_path: Path) -> None:
    for value, condition in enumerate(("fog", "night", "rain", "snow")):
        write_acdc(tmp_path, condition, "val", value, "labelTrainIds")
        write_acdc(tmp_path, condition, "val_ref", 9, "labelTrainIds")
        write_acdc(tmp_path, condition, "val", value, "invIds")
    domains = AcdcSpec().expand()
    assert [d.label() for d in domains] == ["acdc:fog", "acdc:night", "acdc:rain", "acdc:snow"]
    assert [d.expand() for d in domains] == [[d] for d in domains]
    assert [labels(d.build(tmp_path, "val")) for d in domains] == [
        [[value, IGNORE]] for value in range(4)
    ]
    assert labels(AcdcSpec().build(tmp_path, "val")) == [[value, IGNORE] for value in range(4)]
    assert AcdcSpec.variant == "condition" and AcdcSpec().label() == "acdc"


def test_acdc_label_ids_serve_where_train_ids_are_absent(tmp_path: Path) -> None:
    write_acdc(tmp_path, "fog", "train", 23, "labelIds")
    assert labels(AcdcSpec(condition="fog").build(tmp_path, "train")) == [[10, IGNORE]]
