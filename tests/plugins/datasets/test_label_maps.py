"""Label maps against the class names, and lookup tables on arbitrary values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mfuser import IGNORE, DataError
from mfuser.config.classes import CITYSCAPES
from mfuser_plugins.datasets import camvid, idd, mapillary, synthia, urbansyn, wilddash2
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


def by_name(names: str, also: Mapping[str, int] | None = None) -> dict[int, int]:
    """Id -> train id of names in the order of their ids; `also`: of names of other classes."""
    train_ids = {**TRAIN_ID, **(also or {})}
    return {i: train_ids.get(name, IGNORE) for i, name in enumerate(names.split(", "))}


def test_cityscapes_ids_follow_the_names() -> None:
    assert {**by_name(CITYSCAPES_NAMES), IGNORE: IGNORE} == CITYSCAPES_IDS


IDD_NAMES = (
    "road, parking, drivable fallback, sidewalk, rail track, non-drivable fallback, person, "
    "animal, rider, motorcycle, bicycle, autorickshaw, car, truck, bus, caravan, trailer, "
    "train, vehicle fallback, curb, wall, fence, guard rail, billboard, traffic sign, traffic "
    "light, pole, polegroup, obs-str-bar-fallback, building, bridge, tunnel, vegetation, sky, "
    "fallback background, unlabeled, ego vehicle, rectification border, out of roi, license "
    "plate"
)
IDD_LEVEL3 = (
    [0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11]
    + [12, 12, 12, 12, 13, 14, 15, 16, 17, 18, 19, 20, 20, 21, 22, 23, 23, 24, 25, 25]
    + [255] * 5
)
"""The kit's column level3Id, by id."""

WILDDASH_NAMES = (
    "unlabeled, ego vehicle, overlay, out of roi, static, dynamic, ground, road, sidewalk, "
    "parking, rail track, building, wall, fence, guard rail, bridge, tunnel, pole, polegroup, "
    "traffic light, traffic sign, vegetation, terrain, sky, person, rider, car, truck, bus, "
    "caravan, trailer, train, motorcycle, bicycle, pickup, van, billboard, street light, road "
    "marking, junction box, mailbox, manhole, phone booth, pothole, bike rack, traffic sign "
    "frame, utility pole, motorcyclist, bicyclist, other rider, bird, ground animal, curb, "
    "traffic sign any, traffic sign back, trash can, other barrier, other vehicle, "
    "autorickshaw, bench, mountain, tram track, wheeled slow, boat, bike lane, bike lane "
    "sidewalk, banner, dash cam mount, water, sand, pedestrian area, fire hydrant, cctv camera, "
    "snow, catch basin, crosswalk plain, crosswalk zebra, manhole sidewalk, curb terrain, "
    "service lane, curb cut"
)
WILDDASH_POLICY = {
    "road": "road marking, manhole, pothole, tram track, bike lane, pedestrian area, catch basin, "
    "crosswalk plain, crosswalk zebra, service lane",
    "sidewalk": "curb, bike lane sidewalk, manhole sidewalk, curb cut",
    "terrain": "curb terrain",
    "wall": "other barrier",
    "pole": "traffic sign frame, utility pole",
    "rider": "motorcyclist, bicyclist, other rider",
    "car": "van",
    "truck": "pickup",
    "motorcycle": "autorickshaw",
}
"""The authors' policy: Cityscapes class -> what else counts as it."""


def test_urbansyn_ids_are_train_ids_and_one_for_nothing() -> None:
    assert {**{i: i for i in range(19)}, 19: IGNORE} == urbansyn.IDS


def test_idd_ids_follow_the_names_and_its_levels() -> None:
    names = IDD_NAMES.split(", ")
    assert len(names) == len(IDD_LEVEL3) == 40
    wanted = by_name(IDD_NAMES, {"non-drivable fallback": TRAIN_ID["terrain"]})
    assert {**wanted, IGNORE: IGNORE} == idd.IDS
    merged: dict[int, set[int]] = {}
    for i, level3 in enumerate(IDD_LEVEL3):
        merged.setdefault(level3, set()).add(wanted[i])
    for level3, train_ids in merged.items():
        # Of a level that merges a class of Cityscapes with others, that class; vehicles: ignored.
        named = sorted(train_ids - {IGNORE}) if level3 != 12 else []
        assert idd.LEVEL3[level3] == (named[0] if named else IGNORE) and len(named) <= 1, level3


def test_wilddash_ids_follow_the_authors_policy() -> None:
    also = {n: TRAIN_ID[k] for k, others in WILDDASH_POLICY.items() for n in others.split(", ")}
    assert len(WILDDASH_NAMES.split(", ")) == 81
    assert {**by_name(WILDDASH_NAMES, also), IGNORE: IGNORE} == wilddash2.IDS


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
