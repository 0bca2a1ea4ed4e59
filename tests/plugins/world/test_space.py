"""The world's styles and cities: what is drawn, and that the targets lie outside it."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest

from mfuser.config.classes import CITYSCAPES
from mfuser.errors import MFuserError
from mfuser_streets.world import captions, scenes, space

DOMAINS = (scenes.SOURCE, *space.TARGETS, scenes.PRETRAINING, scenes.DEVELOPMENT)
SIZE = (96, 192)

CHECKSUMS = {
    "game": "26b5fe6668f5d708",
    "camera": "887657a9957a1448",
    "fog": "bd1435dcbbb114fd",
    "night": "4694bfe13bdcb5db",
    "rain": "52d3e0c82ee27900",
    "snow": "3755305543c96286",
    "space": "8af02efc586b5da6",
    "development": "dcc20bc9b12ebc99",
}
"""Of the first ten pictures and labels of each domain. When they change, so must WORLD_VERSION,
and the shipped towers must be pretrained anew."""


def draw(domain: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    scene = scenes.scene(0, "val", domain, index, SIZE)
    _, box = scenes.family(domain, index)
    return scenes.picture(scene, box, scenes.rng(0, "val", 100, index)), scene.label()


def apart(a: space.Interval, b: space.Interval) -> bool:
    return a[1] < b[0] or b[1] < a[0]


SEEN = {**space.PRETRAINING, **space.DEVELOPMENT, scenes.SOURCE: space.SOURCE}


@pytest.mark.parametrize("target", space.TARGETS)
@pytest.mark.parametrize("family", SEEN)
def test_targets_lie_outside_all_that_is_trained_or_tuned_on(target: str, family: str) -> None:
    """On the intervals themselves: no draw of one can be a draw of the other, in any of several
    parameters of the style, nor its city and camera."""
    theirs, ours = space.TARGETS[target], SEEN[family]
    styles = [n for n in space.RANGES if apart(theirs.interval(n), ours.interval(n))]
    assert len(styles) >= 3, styles
    cities = ours.cities()
    assert all(apart(span, cities[name]) for name, span in theirs.cities().items())


WEATHER = {"fog": "fog", "night": "night", "rain": "wet", "snow": "snow"}


@pytest.mark.parametrize("target", WEATHER)
def test_a_weather_is_stronger_than_any_that_was_seen(target: str) -> None:
    name = WEATHER[target]
    weakest = space.TARGETS[target].interval(name)[0]
    assert all(box.interval(name)[1] < weakest for box in SEEN.values())


def test_draws_stay_in_their_boxes() -> None:
    for box in (*SEEN.values(), *space.TARGETS.values()):
        for seed in range(20):
            point = box.draw(np.random.default_rng(seed))
            assert point.keys() == space.RANGES.keys()
            for name, value in point.items():
                low, high = box.interval(name)
                assert low <= value <= high
            space.style(point)


def test_the_space_has_no_end() -> None:
    points = {tuple(space.PRETRAINING["plain"].draw(scenes.rng(s, "train", 0, i)).values())
              for s in range(3) for i in range(50)}  # fmt: skip
    assert len(points) == 150


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"fog": 3.0}, "style.fog = 3.0: it goes from 0 to 0.2"),
        ({"night": -0.1}, "style.night = -0.1"),
        ({"gamma": float("nan")}, "style.gamma = nan"),
        ({"fogg": 0.1}, "no parameter 'fogg'; did you mean 'fog'?"),
    ],
)
def test_a_parameter_outside_its_range_is_refused(point: dict[str, float], said: str) -> None:
    with pytest.raises(MFuserError) as caught:
        space.style(point)
    assert said in str(caught.value)


def test_a_box_outside_the_space_is_refused() -> None:
    with pytest.raises(MFuserError, match="style.snow = 2"):
        space.Box(space.SOURCE.view, space.SOURCE.city, {"snow": (0, 2)})


@pytest.mark.parametrize("domain", DOMAINS)
def test_pictures_are_the_same_bit_for_bit(domain: str) -> None:
    found = hashlib.sha256()
    for index in range(10):
        for array in draw(domain, index):
            found.update(array.tobytes())
    assert found.hexdigest()[:16] == CHECKSUMS[domain]


def test_streets_of_two_domains_are_never_the_same() -> None:
    """The targets share theirs, in other weather."""
    domains = (scenes.SOURCE, "camera", scenes.PRETRAINING, scenes.DEVELOPMENT)
    labels = {d: {draw(d, i)[1].tobytes() for i in range(8)} for d in domains}
    assert len(set.union(*labels.values())) == 8 * len(domains)
    np.testing.assert_array_equal(draw("camera", 3)[1], draw("snow", 3)[1])


def test_every_class_is_seen_often_and_large_enough() -> None:
    """At least 0.2 % of the pixels (37 of 96x192) in at least a fifth of the images."""
    labels = np.stack([scenes.scene(0, "train", "game", i, SIZE).label() for i in range(100)])
    share = np.stack([(labels == c).mean((1, 2)) for c in range(len(CITYSCAPES.names))], 1)
    often = (share > 0.002).mean(0)
    assert often.min() >= 0.2, dict(zip(CITYSCAPES.names, often, strict=True))
    small = ("pole", "traffic light", "traffic sign", "person", "rider")
    assert all(often[CITYSCAPES.names.index(name)] > 0.5 for name in small)


def test_depth_and_edges() -> None:
    """Depth grows up the road; edges lie where the label changes."""
    scene = scenes.scene(0, "train", "game", 1, SIZE)
    depth, label = scenes.log_depth(scene), scene.label()
    assert depth.shape == SIZE and depth.dtype == np.float32
    assert np.log(0.4) - 1e-5 <= depth.min() and depth.max() <= np.log(400) + 1e-5
    road = label == CITYSCAPES.names.index("road")
    assert depth[80][road[80]].mean() < depth[60][road[60]].mean()
    edges = scenes.edges(scene, depth)
    assert set(np.unique(edges)) == {0.0, 1.0}
    changes = label[:, 1:] != label[:, :-1]
    assert (edges[:, 1:][changes] == 1).all()


def test_captions_name_what_is_seen() -> None:
    rng = np.random.default_rng(0)
    told = []
    for index in range(60):
        label = scenes.scene(0, "train", "space", index, SIZE).label()
        family, _ = scenes.family("space", index)
        text, named = captions.caption(label, family, rng)
        told.append(text)
        words = text.split()
        assert set(words) <= set(captions.WORDS) and len(words) <= captions.LONGEST
        assert set(named) <= set(captions.visible(label))
        assert all(captions.CLASSES[c] in text for c in named)
    assert len(set(told)) > 50
    assert any("on the left" in t for t in told) and any("in rain" in t for t in told)


@pytest.mark.slow
def test_speed_is_that_of_a_renderer() -> None:
    """Far below the figure in docs/world.md, for machines that are busy: 100 a second there."""
    draw("game", 0)
    start = time.process_time()
    for index in range(20):
        draw("rain", index)
    assert (time.process_time() - start) / 20 < 0.1
