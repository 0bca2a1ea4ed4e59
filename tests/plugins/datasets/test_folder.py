"""The folder reader: every encoding, every way to split, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mfuser import IGNORE, DataError
from mfuser.errors import NoSplitError
from mfuser.plugins.discovery import installed_components
from mfuser_plugins.datasets.folder import FolderSpec

SIZE = (6, 9)  # (H, W)
COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]


def write(root: Path, image: str, mask: str, label: np.ndarray, palette: Any = None) -> None:
    (root / image).parent.mkdir(parents=True, exist_ok=True)
    (root / mask).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(image.encode()))
    pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / image)
    picture = Image.fromarray(label)
    if palette is not None:
        picture.putpalette([v for color in palette for v in color])
    picture.save(root / mask)


def spread(*values: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.resize(np.array(values, dtype), SIZE)


def ids_of(root: Path, split: str = "train", **options: Any) -> list[list[int]]:
    dataset = FolderSpec(**options).build(root, split)
    return [np.unique(dataset[i].label).tolist() for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("label", "options", "expected"),
    [
        (spread(0, 1, 2, 255), {"classes": ["a", "b", "c"]}, [0, 1, 2, IGNORE]),
        (spread(3, 7, 9), {"classes": {"3": "a", "7": "b", "9": "a"}}, [0, 1]),
        (spread(3, 7), {"classes": {"3": "a", "7": "void"}}, [0, IGNORE]),
        (spread(0, 1, 2), {"classes": ["a", "b"], "ignore": [2]}, [0, 1, IGNORE]),
        (spread(0, 1, 2), {"classes": ["a", "b"], "encoding": "off_by_one"}, [0, 1, IGNORE]),
        (spread(0, 255), {"classes": ["a", "b"], "encoding": "binary"}, [0, 1]),
        (spread(0, 1), {"classes": ["a", "b"], "encoding": "binary"}, [0, 1]),
        (
            spread(7, 1000, 40000, dtype=np.uint16),
            {"classes": {"7": "a", "1000": "b", "40000": "c"}},
            [0, 1, 2],
        ),
    ],
    ids=["list", "table", "void", "ignore", "off-by-one", "binary", "binary-01", "16-bit"],
)
def test_encodings_of_ids(
    tmp_path: Path, label: np.ndarray, options: dict[str, Any], expected: list[int]
) -> None:
    write(tmp_path, "images/x.jpg", "masks/x.png", label)
    assert ids_of(tmp_path, **options) == [expected]


def test_colors_from_rgb_and_from_the_palette_of_each_file(tmp_path: Path) -> None:
    table = {"#000000": "ground", "128,0,0": "red", "#008000": "green"}
    rgb = np.array(COLORS, np.uint8)[spread(0, 1, 2)]
    write(tmp_path, "images/a.jpg", "masks/a.png", rgb)
    write(tmp_path, "images/b.jpg", "masks/b.png", spread(0, 1), palette=COLORS[1:])
    assert ids_of(tmp_path, classes=table) == [[0, 1, 2], [1, 2]]


def test_coco_panoptic(tmp_path: Path) -> None:
    segments = np.array([[70_000, 5], [70_000, 0]], np.int64).repeat(3, 0).repeat(2, 1)
    rgb = np.stack([segments & 255, segments >> 8 & 255, segments >> 16], -1).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "x.png")
    for folder, name in (("val2017", "x.jpg"), ("panoptic_val2017", "x.png")):
        (tmp_path / folder).mkdir()
        Image.fromarray(rgb).save(tmp_path / folder / name)
    document = {
        "categories": [{"id": 1, "name": "person"}, {"id": 92, "name": "banner"}],
        "annotations": [
            {
                "file_name": "x.png",
                "segments_info": [{"id": 70_000, "category_id": 92}, {"id": 5, "category_id": 1}],
            }
        ],
    }
    (tmp_path / "panoptic_val2017.json").write_text(json.dumps(document))
    options = {
        "images": "{split}2017",
        "masks": "panoptic_{split}2017",
        "encoding": "panoptic",
        "annotations": "panoptic_{split}2017.json",
    }
    assert ids_of(tmp_path, "val", classes=["person", "banner"], **options) == [[0, 1, IGNORE]]
    assert ids_of(tmp_path, "val", classes=["banner"], **options) == [[0, IGNORE]]
    with pytest.raises(DataError, match="no category 'banners'; did you mean 'banner'"):
        ids_of(tmp_path, "val", classes=["banners"], **options)


def test_splits_by_folder_by_list_and_by_share(tmp_path: Path) -> None:
    for k in range(10):
        split = "training" if k < 7 else "validation"
        write(tmp_path, f"i/{split}/{k}.jpg", f"m/{split}/{k}.png", spread(0, 1))
        with (tmp_path / f"{split[:-3]}.txt").open("a") as file:
            file.write(f"i/{split}/{k}.jpg m/{split}/{k}.png\n" if k % 2 else f"{k}\n")

    def names(split: str, **options: Any) -> list[str]:
        dataset = FolderSpec(classes=["a", "b"], **options).build(tmp_path, split)
        return [dataset.name(i) for i in range(len(dataset))]

    folders = {"images": "i/{split}", "masks": "m/{split}"}
    assert names("train", **folders) == [str(k) for k in range(7)]
    assert names("val", **folders) == ["7", "8", "9"]
    shared = {"images": "i", "masks": "m", "val_share": 0.3}
    train, val = names("train", **shared), names("val", **shared)
    assert len(val) == 3 and sorted(train + val) == [str(k) for k in range(10)]
    assert names("val", **shared) == val and names("val", split_seed=1, **shared) != val
    with pytest.raises(NoSplitError, match="val_share"):
        names("val", images="i", masks="m")


def test_lists_name_stems_or_files(tmp_path: Path) -> None:
    for k in "abc":
        write(tmp_path, f"i/{k}.jpg", f"m/{k}.png", spread(0, 1))
    (tmp_path / "train.txt").write_text("# chosen by hand\na\n\n/i/b.jpg\n")
    options: dict[str, Any] = {"images": "i", "masks": "m", "lists": "{split}.txt"}
    assert len(ids_of(tmp_path, classes=["x", "y"], **options)) == 2
    (tmp_path / "train.txt").write_text("a\nbb\n")
    with pytest.raises(DataError, match="names 1 images that are not there: bb"):
        ids_of(tmp_path, classes=["x", "y"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "names no class"),
        ({"classes": ["a", "a"]}, "names 'a' twice"),
        ({"classes": {"0": "a", "00": "b"}}, "gives the id 0 twice"),
        ({"classes": {"#ff0000": "a", "255,0,0": "b"}}, "gives #ff0000 twice"),
        ({"classes": {"0": "a", "#ff0000": "b"}}, "mixes colors with ids"),
        ({"classes": {"red": "a"}}, "'red' is neither an id"),
        ({"classes": ["a", "b"], "ignore": [1]}, "is in 'ignore' and is class 'b'"),
        ({"classes": ["a"], "ignore": ["#000000"]}, "masks hold ids"),
        ({"classes": ["a", "b", "c"], "encoding": "binary"}, "takes two names, not 3"),
        ({"classes": ["a", "b"], "encoding": "colors"}, "needs a table"),
        ({"classes": ["a"], "encoding": "panoptic"}, "'annotations' goes with"),
        ({"classes": ["a"], "lists": "x", "val_share": 0.1}, "not by two of them"),
        ({"classes": [str(k) for k in range(300)]}, "300 names; a mask of 8 bits holds at most"),
    ],
)
def test_class_tables_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FolderSpec(**options)


def test_what_does_not_pair_or_fit_is_named(tmp_path: Path) -> None:
    write(tmp_path, "images/a.jpg", "masks/a.png", spread(0, 1, 9))
    with pytest.raises(DataError, match=r"a\.png holds the label value 9 .* the map knows 0 to 1"):
        ids_of(tmp_path, classes=["x", "y"])
    write(tmp_path, "images/b.jpg", "masks/b_mask.png", spread(0, 1))
    with pytest.raises(DataError, match=r"1 of 2 images have no mask of the same stem: b\.jpg"):
        ids_of(tmp_path, classes=["x", "y"])
    write(tmp_path, "images/b.png", "masks/b.png", spread(0, 1))
    with pytest.raises(DataError, match=r"b\.jpg and .*b\.png have the same stem"):
        ids_of(tmp_path, classes=["x", "y"])


def stand_in(root: Path, layout: str, count: int = 5) -> None:
    for k in range(count):
        split = "train" if k < 4 else "valid"
        mask = spread(0, 1, 2)
        if layout == "two folders":
            write(root, f"photos/IMG_{k}.jpg", f"masks/IMG_{k}.png", mask)
        elif layout == "suffixes":
            write(root, f"rgb/{k}_rgb.png", f"gt/{k}_label.png", mask)
        elif layout == "one folder":
            write(root, f"{k}.jpg", f"{k}_mask.png", mask)
        elif layout == "same stem":
            write(root, f"{k}.jpg", f"{k}.png", mask, palette=COLORS)
        elif layout == "split first":
            write(root, f"{split}/images/{k}.jpg", f"{split}/labels/{k}.png", mask)
        elif layout == "split last":
            write(root, f"images/{split}/{k}.jpg", f"masks/{split}/{k}.png", mask)
        elif layout == "voc":
            write(root, f"JPEGImages/{k}.jpg", f"SegmentationClass/{k}.png", mask)
            write(root, f"JPEGImages/other{k}.jpg", f"x/{k}.png", mask)
            (root / f"x/{k}.png").unlink()
            lists = root / "ImageSets/Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            with (lists / f"{split[:5].replace('valid', 'val')}.txt").open("a") as file:
                file.write(f"{k}\n")


@pytest.mark.parametrize(
    "layout",
    ["two folders", "suffixes", "one folder", "same stem", "split first", "split last", "voc"],
)
def test_proposals_read_what_they_were_made_from(tmp_path: Path, layout: str) -> None:
    stand_in(tmp_path, layout)
    proposal = FolderSpec.propose(tmp_path)
    assert proposal is not None and not proposal.odd
    table = {"name": "folder", **json.loads(json.dumps(proposal.options))}
    spec = installed_components().validate(("dataset",), table)
    assert isinstance(spec, FolderSpec)
    counts = [len(spec.build(tmp_path, split)) for split in ("train", "val")]
    assert counts == [4, 1]
    assert np.unique(spec.build(tmp_path, "train")[0].label).tolist() == [0, 1, 2]


def test_masks_saved_as_pictures_are_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(4):
        write(tmp_path, f"images/{k}.jpg", f"masks/{k}.png", spread(0, 1))
        noisy = Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8))
        (tmp_path / f"masks/{k}.png").unlink()
        noisy.save(tmp_path / f"masks/{k}.jpg")
    proposal = FolderSpec.propose(tmp_path)
    assert proposal is not None and proposal.options["masks"] == "masks"
    assert any("4 of 4 masks were saved as pictures" in text for text in proposal.odd)


def test_a_folder_without_pairs_gets_no_proposal(tmp_path: Path) -> None:
    assert FolderSpec.propose(tmp_path) is None
    write(tmp_path, "a/x.jpg", "b/y.png", spread(0, 1))
    assert FolderSpec.propose(tmp_path) is None
