"""The dataset `streets`: a function of (seed, domain, split, index), and useful."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import get_args

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mfuser import IGNORE
from mfuser.config.classes import CITYSCAPES
from mfuser_plugins.datasets import streets
from mfuser_plugins.datasets.streets import Streets, StreetsSpec
from mfuser_streets import materials
from mfuser_streets.geometry import Camera, Painter, Thing, painters_order
from mfuser_streets.world import scenes, space

DOMAINS = ("game", "camera", "fog", "night", "rain", "snow")
CLASSES = len(CITYSCAPES.names)


def dataset(domain: str = "game", split: str = "train", **options: object) -> Streets:
    options.setdefault("size", (96, 192))
    return StreetsSpec(domain=domain, **options).build(None, split)  # type: ignore[arg-type]


def digest(data: Streets, index: int) -> str:
    sample = data[index]
    return hashlib.sha256(sample.image.tobytes() + sample.label.tobytes()).hexdigest()


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("size", [(96, 192), (128, 256), (256, 512)])
def test_sample(domain: str, size: tuple[int, int]) -> None:
    sample = dataset(domain, size=size)[3]
    assert sample.image.shape == (*size, 3) and sample.image.dtype == np.uint8
    assert sample.label.shape == size and sample.label.dtype == np.int64
    assert sample.image.std() > 8  # not blank, even at night
    assert sample.image.flags.c_contiguous


def test_large_images_work() -> None:
    assert dataset("night", size=(512, 1024))[0].image.shape == (512, 1024, 3)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(DOMAINS), st.integers(1, 200), st.integers(1, 260), st.integers(0, 2**40),
    st.integers(0, 99),
)  # fmt: skip
def test_any_size_seed_and_index(domain: str, h: int, w: int, seed: int, index: int) -> None:
    data = dataset(domain, "val", size=(h, w), seed=seed)
    sample = data[index]
    assert sample.image.shape == (h, w, 3)
    assert sample.label.shape == (h, w)
    assert set(np.unique(sample.label)) <= {*range(CLASSES), IGNORE}
    np.testing.assert_array_equal(data.label(index), sample.label)


def test_the_order_of_reading_changes_nothing() -> None:
    forward = [digest(dataset("rain"), i) for i in range(4)]
    data = dataset("rain")
    assert [digest(data, i) for i in reversed(range(4))] == forward[::-1]


def test_kept_scenes_are_the_same_and_cannot_be_changed() -> None:
    kept, drawn = dataset(keep=True), dataset()
    before = digest(kept, 4)
    sample = kept[4]
    sample.image[:] = 0
    sample.label[:] = 0
    assert digest(kept, 4) == before == digest(drawn, 4)


def test_another_process_draws_the_same() -> None:
    code = (
        "import hashlib; from mfuser_plugins.datasets.streets import StreetsSpec as S\n"
        "for d in ('game', 'snow'):\n"
        "    s = S(domain=d, size=(96, 192)).build(None, 'train')[5]\n"
        "    print(hashlib.sha256(s.image.tobytes() + s.label.tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [digest(dataset(d), 5) for d in ("game", "snow")]


def test_scenes_are_never_seen_twice() -> None:
    """Across indices, splits, seeds and source against shifted."""
    sources = [dataset(d, s, seed=k) for d in ("game", "fog") for s in ("train", "val")
               for k in (0, 1)]  # fmt: skip
    labels = [d.label(i).tobytes() for d in sources for i in range(4)]
    assert len(set(labels)) == len(labels)


def test_shifted_domains_share_their_streets_and_nothing_else() -> None:
    samples = {d: dataset(d, "val")[2] for d in DOMAINS}
    for domain in DOMAINS[2:]:
        np.testing.assert_array_equal(samples[domain].label, samples["camera"].label)
    images = {s.image.tobytes() for s in samples.values()}
    assert len(images) == len(DOMAINS)
    assert (samples["game"].label != samples["camera"].label).any()


@pytest.mark.parametrize("domain", ["game", "camera"])
def test_every_class_is_there(domain: str) -> None:
    data = dataset(domain)
    labels = np.stack([data.label(i) for i in range(80)])
    present = np.array([[(x == c).sum() >= 10 for c in range(CLASSES)] for x in labels])
    share = present.mean(0)
    assert share.min() >= 0.15, dict(zip(CITYSCAPES.names, share, strict=True))
    ignored = (labels == IGNORE).mean()
    assert 0 < ignored < 0.05


def test_two_sizes_show_the_same_scene() -> None:
    for index in range(4):
        small = dataset("game", size=(128, 256)).label(index)
        large = dataset("game", size=(512, 1024)).label(index)[2::4, 2::4]
        assert (small == large).mean() > 0.96  # edges differ by a pixel
        a = dataset("game", size=(128, 256))[index].image.astype(float)
        b = cv2.resize(dataset("game", size=(512, 1024))[index].image, (256, 128),
                       interpolation=cv2.INTER_AREA)  # fmt: skip
        assert np.abs(a - b).mean() < 8


def test_domains_look_as_they_are_called() -> None:
    mean = {d: np.mean([dataset(d, "val")[i].image for i in range(6)]) for d in DOMAINS}
    assert mean["night"] < 0.6 * mean["camera"]
    assert mean["snow"] > mean["rain"]

    def colorfulness(domain: str) -> float:
        images = np.stack([dataset(domain, "val")[i].image for i in range(6)]).astype(float)
        return float((images.max(-1) - images.min(-1)).mean())

    assert colorfulness("game") > 1.5 * colorfulness("camera")
    road = CITYSCAPES.names.index("road")

    def road_brightness(domain: str) -> float:
        samples = [dataset(domain, "val")[i] for i in range(6)]
        return float(np.mean([s.image[s.label == road].mean() for s in samples]))

    assert road_brightness("snow") > road_brightness("camera")


def test_fog_hides_the_distance() -> None:
    """Contrast near the horizon falls below that of the foreground, relative to clear air."""

    def contrast(domain: str, rows: slice) -> float:
        return float(np.mean([dataset(domain, "val")[i].image[rows].std() for i in range(6)]))

    far, near = slice(36, 44), slice(60, 96)
    assert contrast("fog", far) / contrast("camera", far) < 0.75
    assert contrast("fog", far) / contrast("camera", far) < (
        contrast("fog", near) / contrast("camera", near)
    )


def test_opencv_keeps_its_threads() -> None:
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        dataset()[0]
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


def test_spec() -> None:
    spec = StreetsSpec.model_validate({"name": "streets", "domain": "night", "size": 96})
    assert spec.label() == "streets:night"
    assert spec.size == (96, 96)
    assert StreetsSpec.variant == "domain" and not StreetsSpec.needs_root
    assert spec.expand() == [spec]
    assert [s.label() for s in StreetsSpec(domain="shifted").expand()] == [
        f"streets:{d}" for d in DOMAINS[1:]
    ]
    train, val = spec.build(None, "train"), spec.build(None, "val")
    assert (len(train), len(val)) == (2000, 100)
    assert len(StreetsSpec(count=7).build(None, "val")) == 7
    assert StreetsSpec(split="val").build(None, "train").split == "val"
    assert train.classes == CITYSCAPES.names and train.class_ids == tuple(range(CLASSES))


def test_shifted_as_one_dataset_takes_turns() -> None:
    mixed = dataset("shifted", "val")
    for index, domain in enumerate(DOMAINS[1:]):
        np.testing.assert_array_equal(mixed[index].image, dataset(domain, "val")[index].image)


def test_names_and_fingerprints_tell_apart() -> None:
    variants = [dataset(), dataset("fog"), dataset(split="val"), dataset(seed=1),
                dataset(size=(64, 64)), dataset(count=5), dataset(style={"fog": 0.05}),
                dataset("space"), dataset("development")]  # fmt: skip
    assert len({d.fingerprint() for d in variants}) == len(variants)
    assert dataset()[4].name == dataset().name(4) == "game_train_0_00004"


@pytest.mark.parametrize(
    "options",
    [
        {"style": {"fog": 3}},
        {"style": {"fogg": 0.1}},
        {"domain": "dusk"},
        {"size": 0},
        {"count": 0},
        {"seed": -1},
        {"color": "red"},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        StreetsSpec.model_validate(options)
    assert next(iter(options)) in str(caught.value)
    if "domain" in options:
        assert "'shifted'" in str(caught.value)


def test_a_style_can_be_fixed() -> None:
    """The same street, the same rest of the style: only what is fixed differs."""
    clear, foggy = dataset("game", "val"), dataset("game", "val", style={"fog": 0.08})
    assert foggy[2].image.std() < 0.8 * clear[2].image.std()
    np.testing.assert_array_equal(foggy[2].label, clear[2].label)
    same = dataset("game", "val", style={"fog": 0.0})
    np.testing.assert_array_equal(same[2].image, clear[2].image)


def test_the_domains_are_those_of_the_world() -> None:
    assert streets.SOURCE == scenes.SOURCE
    assert tuple(space.TARGETS) == streets.TARGETS
    assert {*scenes.DOMAINS, "shifted"} == set(get_args(streets.Domain))


def test_families_of_the_space_take_turns() -> None:
    data = dataset("space")
    names = [scenes.family("space", i)[0] for i in range(9)]
    assert names == list(space.PRETRAINING)
    assert len({digest(data, i) for i in range(9)}) == 9


def test_index_out_of_range_ends_iteration() -> None:
    data = dataset(count=3, size=(24, 48))
    assert len([data[i].name for i in range(3)]) == 3
    with pytest.raises(IndexError, match="3 images"):
        data[3]
    assert data[-1].name == data[2].name


def test_materials_cover_the_classes() -> None:
    assert set(materials.LABEL) == {*range(CLASSES), IGNORE}


def test_depth_of_planes() -> None:
    """Every part's plane gives back the depth of the points that were drawn on it."""
    painter = Painter(Camera(1.5, 1.2, 0.45, 0.5), (100, 200), 1, (0.0, 1.0, 0.0))
    points = {"up": (2.0, 0.0, 7.0), "side": (3.0, 1.0, 12.0), "front": (-1.0, 2.0, 5.0)}
    normals = {"up": (0.0, 1.0, 0.0), "side": (-1.0, 0.0, 0.0), "front": (0.0, 0.0, -1.0)}
    for key, (x, y, z) in points.items():
        painter.part("stone", (x, y, z), normals[key])
    for (x, y, z), plane in zip(points.values(), painter.scene().plane[1:], strict=True):
        tangents = np.array([x / z, (y - 1.5) / z, 1.0])
        assert 1 / (plane @ tangents) == pytest.approx(z, rel=1e-5)  # the table is float32


def test_what_hides_comes_after_what_is_hidden() -> None:
    def thing(x0: float, x1: float, z0: float, z1: float) -> Thing:
        return Thing(x0, x1, z0, z1, lambda painter: None)

    house = thing(6, 14, 5, 20)
    tree_in_front, tree_behind = thing(4, 5, 12, 12.5), thing(4, 5, 25, 25.5)
    car = thing(-1, 1, 8, 12)
    things = [car, tree_in_front, house, tree_behind]
    order = painters_order(things)
    assert order.index(3) < order.index(2) < order.index(1)
    assert sorted(order) == [0, 1, 2, 3]
    assert painters_order([]) == []


def test_what_stands_beside_a_long_vehicle_is_behind_it() -> None:
    """Whatever stands on the other side of the road, or further down it."""

    def thing(x0: float, x1: float, z0: float, z1: float) -> Thing:
        return Thing(x0, x1, z0, z1, lambda painter: None)

    van, person = thing(1.5, 3.4, 5, 10), thing(4.3, 4.7, 7, 7.4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = rng.uniform(2, 30, 12)
        others = [thing(-5 - k, -4.5 - k, a, a + 0.5) for k, a in enumerate(z)]
        things = [van, *others, person]
        order = painters_order(things)
        assert order.index(len(things) - 1) < order.index(0)
