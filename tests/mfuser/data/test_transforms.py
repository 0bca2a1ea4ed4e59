"""The augmentation: geometry against a full resize, the two crop rules, colors, bad input."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mfuser import IGNORE, DataError
from mfuser.data import transforms
from mfuser.data.transforms import (
    MEAN_COLOR,
    Augmentation,
    AugmentationSpec,
    View,
    class_share,
    draw_crop,
    draw_view,
    photometric_distortion,
    view_image,
    view_label,
)

PLAIN = AugmentationSpec(scale=(1, 1), flip=0, photometric=False, max_class_share=1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def smooth(height: int, width: int) -> np.ndarray:
    noise = rng().integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (7, 7), 1.5)


@given(
    shape=st.tuples(st.integers(4, 60), st.integers(4, 60)),
    crop=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    factor=st.floats(0.3, 3.0),
    seed=st.integers(0, 99),
)
def test_view_equals_the_window_of_the_whole_resized(shape, crop, factor, seed) -> None:
    view = draw_view(shape, factor, crop, rng(seed))
    image = smooth(*shape)
    label = rng(1).integers(0, 19, shape)
    assert view.scaled == tuple(max(1, int(side * factor + 0.5)) for side in shape)
    assert view.size == tuple(np.minimum(view.scaled, crop))
    assert 0 <= view.top <= view.scaled[0] - view.size[0]
    assert 0 <= view.left <= view.scaled[1] - view.size[1]
    window = (slice(view.top, view.top + view.size[0]), slice(view.left, view.left + view.size[1]))
    resized = cv2.resize(image, view.scaled[::-1], interpolation=cv2.INTER_LINEAR)[window]
    seen = view_image(image, view)
    assert seen.shape == (*view.size, 3)
    # OpenCV rounds the sampling places to 1/32 pixel; neighbors here differ by some 40 levels.
    assert np.abs(seen.astype(int) - resized).max() <= 3
    rows, columns = (
        [int((i + 0.5) * full / scaled + 1e-9) for i in range(start, start + size)]
        for start, size, scaled, full in zip(
            (view.top, view.left), view.size, view.scaled, shape, strict=True
        )
    )
    assert (view_label(label, view) == label[np.ix_(rows, columns)]).all()


def test_image_and_label_stay_on_each_other() -> None:
    """A picture that draws its own label: what comes out must still do so."""
    label = np.kron(rng().integers(0, 19, (12, 20)), np.ones((16, 16), int))
    image = np.repeat((label * 10).astype(np.uint8)[..., None], 3, axis=2)
    augment = Augmentation(AugmentationSpec(photometric=False), (96, 128))
    for seed in range(20):
        out, seen = augment(image, label, rng(seed))
        valid = seen != IGNORE
        # Bilinear edges between tiles differ; at scales of 0.5 to 2 they are a sixth at most.
        assert (np.rint(out[..., 0][valid] / 10) == seen[valid]).mean() > 0.75
        assert valid.all() or (out[~valid] == MEAN_COLOR).all()


@settings(max_examples=50)
@given(
    shape=st.tuples(st.integers(20, 60), st.integers(20, 60)),
    crop=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    wanted=st.none() | st.integers(0, 18),
    seed=st.integers(0, 2**32),
)
def test_what_comes_out(shape, crop, wanted, seed) -> None:
    image, label = smooth(*shape), rng(seed).integers(0, 19, shape)
    before = image.copy(), label.copy()
    augment = Augmentation(AugmentationSpec(), crop)
    out, seen = augment(image, label, rng(seed), wanted)
    assert out.shape == (*crop, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
    assert seen.shape == crop and seen.dtype == np.int64 and seen.flags.c_contiguous
    assert (image == before[0]).all() and (label == before[1]).all()
    again = augment(image, label, rng(seed), wanted)
    assert (again[0] == out).all() and (again[1] == seen).all()
    assert not np.shares_memory(out, image) and not np.shares_memory(seen, label)


def test_plain_crop_is_the_image_itself() -> None:
    image, label = smooth(30, 40), rng().integers(0, 19, (30, 40))
    out, seen = Augmentation(PLAIN, (30, 40))(image, label, rng())
    assert (out == image).all() and (seen == label).all()
    flipped = PLAIN.model_copy(update={"flip": 1.0})
    out, seen = Augmentation(flipped, (30, 40))(image, label, rng())
    assert (out == image[:, ::-1]).all() and (seen == label[:, ::-1]).all()


def test_padding() -> None:
    half = AugmentationSpec(scale=(0.5, 0.5), flip=0)
    image, label = smooth(40, 60), np.zeros((40, 60), np.int64)
    out, seen = Augmentation(half, (40, 50))(image, label, rng())
    assert (seen[:20, :30] == 0).all()
    assert (seen[20:] == IGNORE).all() and (seen[:, 30:] == IGNORE).all()
    assert (out[20:] == MEAN_COLOR).all() and (out[:, 30:] == MEAN_COLOR).all()


def test_class_share_counts_labeled_pixels() -> None:
    assert class_share(np.array([[1, 1, 1, 2, 255, 255]])) == 0.75
    assert class_share(np.full((2, 2), 255)) == 1.0


def test_crops_dominated_by_one_class_are_drawn_again() -> None:
    """Left two thirds one class, the rest noise: most single crops break the rule."""
    label = rng().integers(1, 19, (100, 300))
    label[:, :200] = 0
    image = np.zeros((100, 300, 3), np.uint8)

    def broken(share: float) -> float:
        augment = Augmentation(PLAIN.model_copy(update={"max_class_share": share}), (50, 50))
        seen = [augment(image, label, rng(seed))[1] for seed in range(100)]
        return float(np.mean([class_share(crop) > 0.75 for crop in seen]))

    single = broken(1.0)
    assert 0.4 < single < 0.9
    # Eleven draws: single ** 11 of the crops still break it, below 2 % for single < 0.7.
    assert single < 0.7 and broken(0.75) <= 0.05


def test_a_wanted_class_is_looked_for() -> None:
    label = np.zeros((100, 400), np.int64)
    label[40:60, 100:140] = 11
    image = np.zeros((100, 400, 3), np.uint8)
    augment = Augmentation(PLAIN.model_copy(update={"min_pixels": 300}), (50, 50))

    def share(wanted: int | None) -> float:
        crops = [augment(image, label, rng(seed), wanted)[1] for seed in range(200)]
        return float(np.mean([(crop == 11).sum() >= 300 for crop in crops]))

    blind = share(None)
    expected = 1 - (1 - blind) ** 11
    assert blind < 0.25
    assert abs(share(11) - expected) < 0.1  # three standard deviations of 200 draws


def test_the_crop_that_is_kept_where_none_shows_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released loop keeps the last of eleven; "best" keeps the one that shows most."""
    label = np.zeros((100, 400), np.int64)
    label[40:60, 100:140] = 11
    image = np.zeros((100, 400, 3), np.uint8)
    drawn: list[np.ndarray] = []

    def recorded(*arguments: object) -> tuple[View, np.ndarray]:
        view, seen = draw_crop(*arguments)  # type: ignore[arg-type]
        drawn.append(seen)
        return view, seen

    monkeypatch.setattr(transforms, "draw_crop", recorded)
    hopeless = PLAIN.model_copy(update={"min_pixels": 10**6})
    assert hopeless.keep == "last"
    differ = 0
    for seed in range(20):
        shown = {}
        for keep in ("last", "best"):
            drawn.clear()
            augment = Augmentation(hopeless.model_copy(update={"keep": keep}), (50, 50))
            shown[keep] = augment(image, label, rng(seed), 11)[1]
            assert len(drawn) == 11
        counts = [int((seen == 11).sum()) for seen in drawn]
        assert (shown["last"] == drawn[-1]).all()
        assert (shown["best"] == drawn[int(np.argmax(counts))]).all()
        differ += bool((shown["last"] != shown["best"]).any())
    assert differ > 10


def test_photometric_distortion() -> None:
    image = smooth(64, 64)
    outs = [photometric_distortion(image, rng(seed)) for seed in range(200)]
    means = np.array([out.mean() for out in outs])
    same = np.mean([(out == image).all() for out in outs])
    assert 0.0 < same < 0.2  # all four left out: 1/16
    assert means.std() > 10
    gray = np.full((8, 8, 3), 100, np.uint8)
    for seed in range(50):  # hue and saturation leave gray alone
        out = photometric_distortion(gray, rng(seed))
        assert (out == out[0, 0, 0]).all()
        assert 34 <= out[0, 0, 0] <= 198  # (100 - 32) / 2 and (100 + 32) * 1.5


def test_photometric_contrast_and_order_against_the_formula() -> None:
    """Gray pixels see brightness and contrast alone: replay the draws and compare."""
    gray = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    for seed in range(40):
        generator = rng(seed)
        brightness_on, contrast_on, *_ = generator.random(5) < 0.5
        brightness, contrast = generator.uniform(-32, 32), generator.uniform(0.5, 1.5, 2)[0]
        want = np.clip(np.arange(256) + brightness * brightness_on, 0, 255)
        want = np.clip(want * (contrast if contrast_on else 1), 0, 255)
        out = photometric_distortion(gray, rng(seed))[0, :, 0]
        assert np.abs(out - want).max() <= 1.3  # rounded once or twice, at contrast 1.5 at most


def test_photometric_hue_and_saturation_against_the_formula() -> None:
    """Reds around hue 0, where the hue wraps: replay the draws, without the other two."""
    colors = np.array([[[200, 90, 80], [200, 80, 90], [60, 160, 110]]], np.uint8)
    checked = 0
    for seed in range(400):
        generator = rng(seed)
        brightness_on, contrast_on, saturation_on, hue_on, _ = generator.random(5) < 0.5
        if brightness_on or contrast_on:
            continue
        generator.uniform(-32, 32)
        saturation = generator.uniform(0.5, 1.5, 2)[1] ** int(saturation_on)
        hue = int(generator.integers(-18, 19)) * int(hue_on)
        out = photometric_distortion(colors, rng(seed))
        for rgb, seen in zip(colors[0] / 255, out[0], strict=True):
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            want = colorsys.hsv_to_rgb((h + hue / 180) % 1, min(s * saturation, 1), v)
            # Hue is rounded to 2 degrees; 60 are the whole range, at most 200 levels here.
            assert np.abs(np.array(want) * 255 - seen).max() <= 5
        checked += bool(saturation_on and hue_on)
    assert checked > 10


def test_too_small_and_unequal_images_are_refused() -> None:
    augment = Augmentation(AugmentationSpec(), (64, 64))
    with pytest.raises(DataError, match=r"frame_7 is 80x40, smaller than the crop of 64x64"):
        augment(np.zeros((40, 80, 3), np.uint8), np.zeros((40, 80), int), rng(), name="frame_7")
    with pytest.raises(DataError, match=r"the label is 80x90, the image 80x80"):
        augment(np.zeros((80, 80, 3), np.uint8), np.zeros((90, 80), int), rng())


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (2.0, 0.5)}, {"scale": (0.0, 1.0)}, {"scale": (0.5, float("inf"))},
        {"scale": (1.0, float("nan"))}, {"scale": 1.0}, {"max_class_share": 0.0},
        {"max_class_share": 1.1}, {"flip": -0.1}, {"flip": 2}, {"min_pixels": -1}, {"crop": 512},
    ],
)  # fmt: skip
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ValidationError):
        AugmentationSpec(**options)
