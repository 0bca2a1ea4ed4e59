"""Label maps against the class names, and lookup tables on arbitrary values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mfuser import IGNORE, DataError
from mfuser.config.classes import CITYSCAPES
from mfuser_plugins.datasets import camvid, mapillary, synthia
from mfuser_plugins.datasets._files import CITYSCAPES_IDS, TRAIN_IDS, LabelMap

TRAIN_ID = {name: i for i, name in enumerate(CITYSCAPES.names)}
FILE = Path("label.png")

CITYSCAPES_NAMES = (
    "unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, road, "
    "sidewalk, parking, rail track, building, wall, fence, guard rail, bridge, tunnel, pole, "
    "polegroup, traffic light, traffic sign, vegetation, terrain, sky, person, rider, car, truck, "
    "bus, caravan, trailer, train, motorcycle, bicycle, license plate"
)

SYNTHIA_NAMES = (
    "void, sky, building, road, sidewalk, fence, vegetation, pole, car, traffic sign, person, "
    "bicycle, motorcycle, parking-slot, road-work, traffic light, terrain, rider, truck, bus, "
    "train, wall, lane marking"
)

MAPILLARY_NAMES = (
    "Bird, Ground Animal, Curb, Fence, Guard Rail, Barrier, Wall, Bike Lane, Crosswalk - Plain, "
    "Curb Cut, Parking, Pedestrian Area, Rail Track, Road, Service Lane, Sidewalk, Bridge, "
    "Building, Tunnel, Person, Bicyclist, Motorcyclist, Other Rider, Lane Marking - Crosswalk, "
    "Lane Marking - General, Mountain, Sand, Sky, Snow, Terrain, Vegetation, Water, Banner, Bench, "
    "Bike Rack, Billboard, Catch Basin, CCTV Camera, Fire Hydrant, Junction Box, Mailbox, Manhole, "
    "Phone Booth, Pothole, Street Light, Pole, Traffic Sign Frame, Utility Pole, Traffic Light, "
    "Traffic Sign (Back), Traffic Sign (Front), Trash Can, Bicycle, Boat, Bus, Car, Caravan, "
    "Motorcycle, On Rails, Other Vehicle, Trailer, Truck, Wheeled Slow, Car Mount, Ego Vehicle, "
    "Unlabeled"
)


def by_name(names: str) -> dict[int, int]:
    return {i: TRAIN_ID.get(name, IGNORE) for i, name in enumerate(names.split(", "))}


def test_cityscapes_ids_follow_the_names() -> None:
    assert {**by_name(CITYSCAPES_NAMES), IGNORE: IGNORE} == CITYSCAPES_IDS


def test_synthia_ids_follow_the_names() -> None:
    assert by_name(SYNTHIA_NAMES) == synthia.IDS


def test_camvid_ids_follow_the_names() -> None:
    names = "sky, building, pole, road, sidewalk, vegetation, traffic sign, fence, car, person"
    assert by_name(f"{names}, bicycle, void") == camvid.IDS


def dgss(name: str) -> int:
    """The name rules of the domain-generalization papers' converter; the order matters."""
    low = name.lower()
    if low in TRAIN_ID:
        return TRAIN_ID[low]
    if "sign" in low and ("front" in low or "back" in low or "frame" in low):
        return TRAIN_ID["traffic sign"]
    if "on rails" in low:
        return TRAIN_ID["train"]
    if "cyclist" in low or "rider" in low:
        return TRAIN_ID["rider"]
    if "pole" in low or "street light" in low:
        return TRAIN_ID["pole"]
    if "curb" in low or "pedestrian area" in low:
        return TRAIN_ID["sidewalk"]
    road = ("crosswalk - plain", "parking", "bike lane", "service lane", "lane marking")
    return TRAIN_ID["road"] if any(part in low for part in road) else IGNORE


def robustnet(name: str) -> int:
    ignored = {"Bike Lane", "Crosswalk - Plain", "Curb Cut", "Parking", "Pedestrian Area"}
    ignored |= {"Service Lane", "Lane Marking - Crosswalk", "Street Light", "Traffic Sign Frame"}
    ignored |= {"Traffic Sign (Back)"}
    if name == "Manhole":
        return TRAIN_ID["road"]
    return IGNORE if name in ignored else dgss(name)


@pytest.mark.parametrize(("mapping", "rule"), [("dgss", dgss), ("robustnet", robustnet)])
def test_mapillary_ids_follow_the_name_rules(mapping: str, rule) -> None:
    names = MAPILLARY_NAMES.split(", ")
    assert len(names) == mapillary.NUM_LABELS
    ids = {**dict.fromkeys(range(66), IGNORE), **mapillary.COMMON, **mapillary.MAPPINGS[mapping]}
    assert ids == {i: rule(name) for i, name in enumerate(names)}


SHAPES = npst.array_shapes(min_dims=2, max_dims=2, max_side=8)


@given(
    ids=st.dictionaries(st.integers(0, 255), st.integers(0, 18) | st.just(IGNORE), min_size=1),
    raw=npst.arrays(st.sampled_from([np.uint8, np.uint16, np.int32]), SHAPES,
                    elements={"min_value": 0, "max_value": 255}),
)  # fmt: skip
def test_table_equals_the_dictionary_or_refuses(ids: dict[int, int], raw: np.ndarray) -> None:
    label_map = LabelMap(ids)
    strange = sorted(set(raw.ravel().tolist()) - set(ids))
    if strange:
        with pytest.raises(DataError, match=rf"label.png holds the label value {strange[0]}\b"):
            label_map(raw, FILE)
    else:
        label = label_map(raw, FILE)
        assert label.dtype == np.int64
        assert label.tolist() == [[ids[v] for v in row] for row in raw.tolist()]


@pytest.mark.parametrize("value", [19, 254, 256, 65535])
def test_wide_values_do_not_wrap_into_the_table(value: int) -> None:
    with pytest.raises(DataError, match=rf"value {value} \(1 pixels\); .* 0 to 18, 255"):
        TRAIN_IDS(np.array([[0, value]], np.uint16), FILE)


def test_negative_values_are_refused() -> None:
    with pytest.raises(DataError, match="value -1"):
        TRAIN_IDS(np.array([[0, -1]], np.int32), FILE)


def test_key_tells_maps_apart() -> None:
    maps = [LabelMap({0: 1}), LabelMap({0: 2}), LabelMap({0: 1}, channel=0)]
    maps.append(LabelMap({0: 1}, colors={(1, 2, 3): 4}))
    assert len({m.key() for m in maps}) == len(maps)
    assert LabelMap({0: 1}).key() == maps[0].key()
