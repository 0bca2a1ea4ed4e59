"""The other datasets: each reader on a stand-in in the official layout and encoding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import ids, labels, write_image, write_label

from mfuser import IGNORE, DataError
from mfuser_plugins.datasets.bravo import BravoSpec
from mfuser_plugins.datasets.camvid import CamvidSpec
from mfuser_plugins.datasets.dark_zurich import DarkZurichSpec
from mfuser_plugins.datasets.idd import IddSpec
from mfuser_plugins.datasets.muses import MusesSpec
from mfuser_plugins.datasets.nighttime_driving import NighttimeDrivingSpec
from mfuser_plugins.datasets.urbansyn import UrbanSynSpec
from mfuser_plugins.datasets.wilddash2 import WildDash2Spec


def write_camvid(root: Path) -> None:
    lines = []
    for sequence, split in (("0016E5", "train"), ("0016E5", "val"), ("0001TP", "train"),
                            ("Seq05VD", "test")):  # fmt: skip
        name = f"{sequence}_{split}.png"
        write_image(root / "images" / name)
        write_label(root / "labels" / name, ids(3, 11))
        lines.append(f"{name} {sequence} {split}")
    (root / "list.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("sequences", "split", "names"),
    [
        (None, "train", ["0001TP_train", "0016E5_train"]),
        (None, "val", ["0016E5_val", "Seq05VD_test"]),
        ("0016E5+0001TP", "train", ["0001TP_train", "0016E5_train"]),
        (["0016E5"], "val", ["0016E5_val"]),
        ("Seq05VD", "val", ["Seq05VD_test"]),
    ],
)
def test_camvid_list(tmp_path: Path, sequences, split: str, names: list[str]) -> None:
    write_camvid(tmp_path)
    spec = CamvidSpec(sequences=sequences)
    dataset = spec.build(tmp_path, split)
    assert [dataset.name(i) for i in range(len(dataset))] == names
    assert labels(dataset) == [[0, IGNORE]] * len(names)
    assert dataset.class_ids == (0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 18)
    assert CamvidSpec.model_validate(spec.model_dump()) == spec


def test_camvid_label_and_mistakes(tmp_path: Path) -> None:
    write_camvid(tmp_path)
    assert CamvidSpec(sequences="0016E5+0001TP").label() == "camvid:0016E5+0001TP"
    with pytest.raises(DataError, match="no sequence 'Seq05'.*did you mean 'Seq05VD'"):
        CamvidSpec(sequences="Seq05").build(tmp_path, "val")
    with pytest.raises(DataError, match="camvid:Seq05VD: none of its frames is of the train"):
        CamvidSpec(sequences="Seq05VD").build(tmp_path, "train")
    with (tmp_path / "list.txt").open("a") as file:
        file.write("gone.png 0016E5 train\n")
    with pytest.raises(DataError, match="names 1 images that .*images does not hold: gone"):
        CamvidSpec().build(tmp_path, "train")
    (tmp_path / "list.txt").write_text("0016E5_train.png train\n")
    with pytest.raises(DataError, match=r"list.txt, line 1: expected 'FILE SEQUENCE SPLIT'"):
        CamvidSpec().build(tmp_path, "train")


def test_camvid_folders_of_segnet(tmp_path: Path) -> None:
    for part, sequence in (("train", "0016E5"), ("val", "0016E5"), ("test", "Seq05VD")):
        write_image(tmp_path / part / f"{sequence}_f1.png")
        write_label(tmp_path / f"{part}annot" / f"{sequence}_f1.png", ids(0))
    assert len(CamvidSpec().build(tmp_path, "train")) == 1
    assert len(CamvidSpec().build(tmp_path, "val")) == 2
    assert len(CamvidSpec(sequences="Seq05VD").build(tmp_path, "val")) == 1


def test_dark_zurich(tmp_path: Path) -> None:
    key = "val/night/GOPR0356/GOPR0356_frame_000321"
    write_image(tmp_path / f"rgb_anon/{key}_rgb_anon.png")
    write_image(
        tmp_path / "rgb_anon/val_ref/day/GOPR0356_ref/GOPR0356_frame_000321_ref_rgb_anon.png"
    )
    write_label(tmp_path / f"gt/{key}_gt_labelTrainIds.png", ids(0, 10, 255))
    write_label(tmp_path / f"gt/{key}_gt_labelIds.png", ids(4))
    write_label(tmp_path / f"gt/{key}_gt_invIds.png", ids(1))
    dataset = DarkZurichSpec().build(tmp_path, "val")
    assert labels(dataset) == [[0, 10, IGNORE]] and dataset.name(0) == "GOPR0356_frame_000321"
    (tmp_path / f"gt/{key}_gt_labelTrainIds.png").unlink()
    assert labels(DarkZurichSpec().build(tmp_path, "val")) == [[IGNORE]]


@pytest.mark.parametrize("below", ["", "NighttimeDrivingTest"])
def test_nighttime_driving_is_its_test_images(tmp_path: Path, below: str) -> None:
    root = tmp_path / below
    write_image(root / "leftImg8bit/test/night/0_frame_0001_leftImg8bit.png")
    name = "0_frame_0001_gtCoarse"
    folder = root / "gtCoarse_daytime_trainvaltest/test/night"
    write_label(folder / f"{name}_labelIds.png", ids(7, 23, 0))
    write_label(folder / f"{name}_labelColors.png", ids(7))
    assert labels(NighttimeDrivingSpec().build(tmp_path, "val")) == [[0, 10, IGNORE]]
    write_label(folder / f"{name}_labelTrainIds.png", ids(2))
    assert labels(NighttimeDrivingSpec().build(tmp_path, "val")) == [[2]]
    with pytest.raises(DataError, match="split 'train' does not exist: .* 50 test images"):
        NighttimeDrivingSpec().build(tmp_path, "train")


def write_muses(root: Path, condition: str, time: str, value: int, suffix: str) -> None:
    key = f"val/{condition}/{time}/REC0006_frame_{value:06d}"
    write_image(root / f"frame_camera/{key}_frame_camera.png")
    write_label(root / f"gt_semantic/{key}_gt_{suffix}.png", ids(value, 255))


def test_muses_is_one_domain_per_weather(tmp_path: Path) -> None:
    for value, condition in enumerate(("clear", "fog", "rain", "snow")):
        write_muses(tmp_path, condition, "day", value, "labelTrainIds")
        write_muses(tmp_path, condition, "night", value + 7, "labelTrainIds")
        write_muses(tmp_path, condition, "night", value + 7, "labelColor")
    domains = MusesSpec().expand()
    assert [d.label() for d in domains] == [f"muses:{c}" for c in ("clear", "fog", "rain", "snow")]
    assert [labels(d.build(tmp_path, "val")) for d in domains] == [
        [[value, IGNORE], [value + 7, IGNORE]] for value in range(4)
    ]
    night = MusesSpec(condition="fog", time="night")
    assert night.label() == "muses:fog-night" and night.expand() == [night]
    assert labels(night.build(tmp_path, "val")) == [[8, IGNORE]]
    assert [d.label() for d in MusesSpec(time="day").expand()][0] == "muses:clear-day"
    assert len(MusesSpec(time="day").build(tmp_path, "val")) == 4
    assert MusesSpec().label() == "muses"


def test_muses_label_ids_serve_where_train_ids_are_absent(tmp_path: Path) -> None:
    write_muses(tmp_path, "rain", "day", 23, "labelIds")
    assert labels(MusesSpec(condition="rain").build(tmp_path, "val")) == [[10, IGNORE]]


def test_urbansyn_labels_have_a_name_of_their_own(tmp_path: Path) -> None:
    for i in (1, 2):
        write_image(tmp_path / f"rgb/rgb_{i:04d}.png")
        write_label(tmp_path / f"ss/ss_{i:04d}.png", ids(0, 18, 19))
    write_image(tmp_path / "ss_colour/ss_colour_0001.png")
    assert labels(UrbanSynSpec().build(tmp_path, "train")) == [[0, 18, IGNORE]] * 2
    (tmp_path / "ss/ss_0002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images .* rgb_0002.png; .*ss/ss_0002.png"):
        UrbanSynSpec().build(tmp_path, "train")


def test_urbansyn_split_folders_of_the_users_own(tmp_path: Path) -> None:
    for part, value in (("train", 3), ("val", 5)):
        write_image(tmp_path / f"rgb/{part}/rgb_0001.png")
        write_label(tmp_path / f"ss/{part}/ss_0001.png", ids(value))
    assert labels(UrbanSynSpec().build(tmp_path, "val")) == [[5]]


def test_idd_in_the_encodings_of_its_kit(tmp_path: Path) -> None:
    for drive, suffix in (("0", "png"), ("201", "jpg")):
        key = f"train/{drive}/frame0029"
        write_image(tmp_path / f"leftImg8bit/{key}_leftImg8bit.{suffix}")
        (tmp_path / f"gtFine/train/{drive}").mkdir(parents=True)
        (tmp_path / f"gtFine/{key}_gtFine_polygons.json").write_text("{}")
    with pytest.raises(DataError, match=r"2 of 2 .*labelcsTrainIds.png"):
        IddSpec().build(tmp_path, "train")
    for drive in ("0", "201"):
        name = tmp_path / f"gtFine/train/{drive}/frame0029_gtFine_label"
        write_label(Path(f"{name}csTrainIds.png"), ids(0, 9, 255))
        write_label(Path(f"{name}ids.png"), ids(0, 5, 11))
        write_label(Path(f"{name}level3Ids.png"), ids(0, 3, 8, 12))
    assert labels(IddSpec().build(tmp_path, "train")) == [[0, 9, IGNORE]] * 2
    assert labels(IddSpec(encoding="id").build(tmp_path, "train")) == [[0, 9, IGNORE]] * 2
    coarse = IddSpec(encoding="level3Id").build(tmp_path, "train")
    assert labels(coarse) == [[0, 9, IGNORE]] * 2
    assert 16 not in coarse.class_ids and 16 in IddSpec().build(tmp_path, "train").class_ids


def test_wilddash2_panoptic(tmp_path: Path) -> None:
    """Segment ids in three bytes; what they are stands in the JSON file."""
    write_image(tmp_path / "images/aa0001_100000.jpg")
    colors = np.array([(7, 0, 0), (1, 2, 3), (0, 0, 0)], np.uint8)
    write_label(tmp_path / "panoptic/aa0001_100000.png", colors[ids(0, 1, 2)])
    segments = [{"id": 7, "category_id": 38}, {"id": 1 + 2 * 256 + 3 * 65536, "category_id": 34}]
    document = {"annotations": [{"file_name": "aa0001_100000.png", "segments_info": segments}]}
    (tmp_path / "panoptic.json").write_text(json.dumps(document))
    assert labels(WildDash2Spec().build(tmp_path, "train")) == [[0, 14, IGNORE]]
    segments[0]["category_id"] = 99
    (tmp_path / "panoptic.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"panoptic.json is not the published .*KeyError: 99"):
        WildDash2Spec().build(tmp_path, "train")


@pytest.mark.parametrize("suffix", ["", "_labelIds"])
def test_wilddash2_category_ids(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / "images/aa0001_100000.jpg")
    write_label(tmp_path / f"labels/aa0001_100000{suffix}.png", ids(7, 35, 37, 80))
    assert labels(WildDash2Spec().build(tmp_path, "train")) == [[0, 1, 13, IGNORE]]
    with pytest.raises(DataError, match="ships without a val split"):
        WildDash2Spec().build(tmp_path, "val")


def test_bravo_reads_the_labels_of_cityscapes(tmp_path: Path) -> None:
    """Two subsets of other images in drawn weather; names and labels are Cityscapes' own."""
    for subset, city, n in (("synrain", "lindau", 1), ("synrain", "munster", 2),
                            ("synflare", "lindau", 3)):  # fmt: skip
        name = f"{city}/{city}_{n:06d}_000019"
        write_image(tmp_path / f"bravo_{subset}/{name}_leftImg8bit.png")
        write_label(tmp_path / f"gtFine/val/{name}_gtFine_labelIds.png", ids((7, 8, 11)[n - 1], 0))
    write_label(tmp_path / "gtFine/val/ulm/ulm_000009_000019_gtFine_labelIds.png", ids(7))
    rain, flare = BravoSpec().expand()
    assert [d.label() for d in (rain, flare)] == ["bravo:synrain", "bravo:synflare"]
    assert labels(rain.build(tmp_path, "val")) == [[0, IGNORE], [1, IGNORE]]
    assert labels(flare.build(tmp_path, "val")) == [[2, IGNORE]]
    assert len(BravoSpec().build(tmp_path, "val")) == 3 and BravoSpec().label() == "bravo"
    with pytest.raises(DataError, match="bravo: the split 'train' does not exist"):
        BravoSpec().build(tmp_path, "train")
    with pytest.raises(ValueError, match="synrain.*synflare"):
        BravoSpec.model_validate({"condition": "outofcontext"})
