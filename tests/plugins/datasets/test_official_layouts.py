"""Every reader on a stand-in written in the dataset's official layout and encoding."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mfuser import IGNORE, DataError, Dataset
from mfuser.config.classes import CITYSCAPES
from mfuser.plugins.discovery import components
from mfuser_plugins.datasets.acdc import AcdcSpec
from mfuser_plugins.datasets.bdd100k import Bdd100kSpec
from mfuser_plugins.datasets.camvid import CamvidSpec
from mfuser_plugins.datasets.cityscapes import CityscapesSpec
from mfuser_plugins.datasets.dark_zurich import DarkZurichSpec
from mfuser_plugins.datasets.gta import GtaSpec
from mfuser_plugins.datasets.idd import IddSpec
from mfuser_plugins.datasets.mapillary import V12_START, MapillarySpec
from mfuser_plugins.datasets.muses import MusesSpec
from mfuser_plugins.datasets.nighttime_driving import NighttimeDrivingSpec
from mfuser_plugins.datasets.synthia import SynthiaSpec
from mfuser_plugins.datasets.urbansyn import UrbanSynSpec
from mfuser_plugins.datasets.wilddash2 import WildDash2Spec

HEIGHT, WIDTH = 6, 9


def ids(*values: int) -> np.ndarray:
    """(6, 9) uint8 that holds these values in turn."""
    return np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))


def write_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(path.name.encode()))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_label(
    path: Path, array: np.ndarray, palette: list[tuple[int, int, int]] | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette([value for color in palette for value in color])
        assert image.mode == "P"
    image.save(path)


def labels(dataset: Dataset) -> list[list[int]]:
    """The distinct train ids of every sample, after checking what every sample must be."""
    result = []
    for i in range(len(dataset)):
        sample = dataset[i]
        assert sample.image.dtype == np.uint8 and sample.image.shape == (HEIGHT, WIDTH, 3)
        assert sample.label.dtype == np.int64 and sample.label.shape == (HEIGHT, WIDTH)
        assert sample.name == dataset.name(i)
        assert (dataset.label(i) == sample.label).all()
        result.append(np.unique(sample.label).tolist())
    return result


def test_all_are_offered() -> None:
    names = {"gta", "synthia", "cityscapes", "bdd100k", "mapillary", "acdc", "camvid"}
    names |= {"urbansyn", "dark_zurich", "nighttime_driving", "muses", "idd", "wilddash2"}
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
