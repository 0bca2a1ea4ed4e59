"""The training augmentation: scale, crop, flip, photometric distortion.

Pure functions of (image, label, rng): the same generator state gives the same crop.

The whole scaled image is never computed. The crop's window is drawn in the scaled image's
coordinates, by the label alone, and only its pixels are sampled from the original, so that drawing
a crop again costs less than a millisecond, whatever the size of the image, and an image that is
still in its file need not be decoded beyond the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, field_validator

from mfuser.errors import DataError
from mfuser.interfaces import IGNORE
from mfuser.specs import Options

if TYPE_CHECKING:
    from mfuser.data.pictures import Picture

TRIES = 10
"""Re-crops, both for the class share and for a wanted class (mmsegmentation, DAFormer)."""

MEAN_COLOR = (123, 117, 104)
"""RGB of padding: CLIP's image mean, so that padding is about 0 after normalization."""

Factor = Annotated[float, Field(ge=0.1, le=10.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class AugmentationSpec(Options):
    """The augmentation of training images (paper, section 5.1; defaults as released).

    scale: range of the factor by which the image is resized before it is cropped.
    max_class_share: crops are drawn again, up to ten times, while one class covers more than
        this share of the labeled pixels. 1 accepts every crop.
    flip: probability of a horizontal flip.
    photometric: whether brightness, contrast, saturation and hue are changed.
    min_pixels: where a class is wanted (rare-class sampling), crops are drawn again, up to ten
        times, until it covers this many pixels.
    keep: which crop is taken if none of the eleven qualifies: "last", as released, or "best", the
        one that shows most of the class.
    """

    scale: tuple[Factor, Factor] = (0.5, 2.0)
    max_class_share: Share = 0.75
    flip: Probability = 0.5
    photometric: bool = True
    min_pixels: NonNegativeInt = 1500
    keep: Literal["last", "best"] = "last"

    @field_validator("scale")
    @classmethod
    def _ascending(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError(f"the range runs from low to high; {list(scale)} does not")
        return scale


@dataclass(frozen=True)
class View:
    """A window of a resized image.

    scaled: (height, width) that the image is resized to.
    top, left: the window's corner there, in pixels.
    size: (height, width) of the window; smaller than the crop where the resized image is.
    """

    scaled: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]


def draw_factor(scale: tuple[float, float], rng: np.random.Generator) -> float:
    """A scale factor, uniform in the range."""
    return float(rng.uniform(*scale))


def draw_view(
    shape: tuple[int, int], factor: float, crop: tuple[int, int], rng: np.random.Generator
) -> View:
    """A window of size `crop`, placed uniformly in an image of `shape` resized by `factor`."""
    height, width = (max(1, int(side * factor + 0.5)) for side in shape)
    top = int(rng.integers(max(height - crop[0], 0) + 1))
    left = int(rng.integers(max(width - crop[1], 0) + 1))
    return View((height, width), top, left, (min(height, crop[0]), min(width, crop[1])))


def view_label(label: np.ndarray, view: View) -> np.ndarray:
    """The window of the label (H, W) resized to `view.scaled` with nearest neighbors."""
    rows, columns = (
        # Pixel centers: output pixel i covers the input at (i + 1/2) / factor.
        (2 * (np.arange(size) + start) + 1) * full // (2 * scaled)
        for start, size, scaled, full in zip(
            (view.top, view.left), view.size, view.scaled, label.shape, strict=True
        )
    )
    cropped: np.ndarray = label[rows].take(columns, axis=1)
    return cropped


def view_image(image: np.ndarray | Picture, view: View) -> np.ndarray:
    """The window of the image (H, W, 3) resized to `view.scaled` bilinearly, no antialiasing.

    A JPEG file that is resized to half or less is decoded at 1/2, 1/4 or 1/8 of its size, as its
    blocks allow, and resized from there.
    """
    import cv2

    if view.scaled == image.shape[:2]:
        rows = slice(view.top, view.top + view.size[0])
        return image[rows, slice(view.left, view.left + view.size[1])].copy()
    extent: tuple[float, float] = image.shape[0], image.shape[1]
    if not isinstance(image, np.ndarray):
        reduced = image.reduced(view.scaled)
        image, extent = (image, extent) if reduced is None else reduced
    # Only the source pixels that the window touches: OpenCV's remapping reads 16-bit coordinates.
    starts, stops, offsets, steps = [], [], [], []
    for start, size, scaled, shown, full in zip(
        (view.top, view.left), view.size, view.scaled, extent, image.shape[:2], strict=True
    ):
        step = shown / scaled
        first = (start + 0.5) * step - 0.5
        begin = min(max(int(np.floor(first)) - 1, 0), full - 1)
        end = min(int(np.ceil(first + (size - 1) * step)) + 2, full)
        starts.append(begin)
        stops.append(max(end, begin + 1))
        offsets.append(first - begin)
        steps.append(step)
    part = image[slice(starts[0], stops[0]), slice(starts[1], stops[1])]
    matrix = np.array([[steps[1], 0.0, offsets[1]], [0.0, steps[0], offsets[0]]])
    resized: np.ndarray = cv2.warpAffine(
        part,
        matrix,
        (view.size[1], view.size[0]),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return resized


def class_share(label: np.ndarray) -> float:
    """The share of the labeled pixels that the most frequent class covers; 1 if there is none."""
    counts = _counts(label)[:IGNORE]
    total = int(counts.sum())
    return float(counts.max() / total) if total else 1.0


def _counts(label: np.ndarray) -> np.ndarray:
    """(at least 256,) pixels of each class."""
    import cv2

    # OpenCV gives float32, in which whole numbers are exact up to this.
    if label.dtype == np.uint8 and 0 < label.size <= 1 << 24:
        found = cv2.calcHist(
            [np.ascontiguousarray(label)], [0], None, [IGNORE + 1], [0, IGNORE + 1]
        )
        counts: np.ndarray = found.ravel().astype(np.int64)
        return counts
    return np.bincount(label.ravel(), minlength=IGNORE + 1)


def draw_crop(
    label: np.ndarray,
    crop: tuple[int, int],
    scale: tuple[float, float],
    max_class_share: float,
    rng: np.random.Generator,
) -> tuple[View, np.ndarray]:
    """A random scale and window, drawn again while one class covers too much of it.

    The last of eleven windows is taken as it is (mmsegmentation's RandomCrop). Returns the window
    and its label.
    """
    height, width = label.shape
    factor = draw_factor(scale, rng)
    for attempt in range(TRIES + 1):
        view = draw_view((height, width), factor, crop, rng)
        seen = view_label(label, view)
        if attempt == TRIES or max_class_share >= 1 or class_share(seen) <= max_class_share:
            break
    return view, seen


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness ±32, contrast and saturation ×0.5–1.5, hue ±36°, each with probability 1/2.

    Contrast comes before or after the other two, with probability 1/2 (SSD, Liu et al. 2016,
    section 3.6; ranges as in mmsegmentation). Tables of 256 entries, so the cost is that of two
    color conversions. image: uint8 (H, W, 3) RGB; returns a new one.
    """
    import cv2

    # Always the same number of draws, so that what follows does not depend on the outcome.
    use_brightness, use_contrast, use_saturation, use_hue, contrast_first = rng.random(5) < 0.5
    brightness = rng.uniform(-32.0, 32.0)
    contrast, saturation = rng.uniform(0.5, 1.5, size=2)
    hue = int(rng.integers(-18, 19))  # OpenCV counts hue in steps of 2 degrees

    levels = np.arange(256)
    first = levels.astype(np.float64)
    if use_brightness:
        first = np.clip(first + brightness, 0, 255)
    if use_contrast and contrast_first:
        first = np.clip(first * contrast, 0, 255)
    image = cv2.LUT(image, _table(first))
    if use_saturation or use_hue:
        hsv_tables = np.stack(
            [
                (levels + hue * use_hue) % 180,
                np.clip(levels * (saturation if use_saturation else 1.0), 0, 255),
                levels,
            ],
            axis=-1,
        )
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), _table(hsv_tables)[None])
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if use_contrast and not contrast_first:
        image = cv2.LUT(image, _table(np.clip(levels * contrast, 0, 255)))
    return image


def _table(values: np.ndarray) -> np.ndarray:
    table: np.ndarray = np.rint(values).astype(np.uint8)
    return table


def pad(array: np.ndarray, size: tuple[int, int], fill: int | tuple[int, ...]) -> np.ndarray:
    """Padded at the bottom and on the right to `size` (height, width)."""
    if array.shape[:2] == size:
        return array
    out = np.empty((*size, *array.shape[2:]), array.dtype)
    out[...] = fill
    out[: array.shape[0], : array.shape[1]] = array
    return out


class Augmentation:
    """Random scale, crop, flip and photometric distortion of an image with its label.

    crop: (height, width) of the result. Where the scaled image is smaller, it is padded with
    `MEAN_COLOR` and the ignored label.
    """

    def __init__(self, spec: AugmentationSpec, crop: tuple[int, int]) -> None:
        self.spec = spec
        self.crop = (int(crop[0]), int(crop[1]))

    def __call__(
        self,
        image: np.ndarray | Picture,
        label: np.ndarray,
        rng: np.random.Generator,
        wanted: int | None = None,
        name: str = "image",
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (H, W, 3), int64 or uint8 (H, W) -> the same of size `crop`, contiguous.

        image: read, or still in its file, of which only the window is decoded then. wanted: a
        class id that the crop should show (`min_pixels`). `name` is for errors.
        Raises DataError if image and label differ in size, or are stored smaller than the crop, and
        UnreadableImage for pixels that cannot be decoded.
        """
        self._check(image, label, name)
        view, seen = self._crop(label, rng, wanted)
        out = view_image(image, view)
        if rng.random() < self.spec.flip:
            out, seen = out[:, ::-1], seen[:, ::-1]
        if self.spec.photometric:
            out = photometric_distortion(np.ascontiguousarray(out), rng)
        return (
            np.ascontiguousarray(pad(out, self.crop, MEAN_COLOR)),
            np.ascontiguousarray(pad(seen, self.crop, IGNORE)),
        )

    def _crop(
        self, label: np.ndarray, rng: np.random.Generator, wanted: int | None
    ) -> tuple[View, np.ndarray]:
        spec = self.spec
        most = -1
        for _ in range(1 if wanted is None else TRIES + 1):
            view, seen = draw_crop(label, self.crop, spec.scale, spec.max_class_share, rng)
            count = 0 if wanted is None else int(np.count_nonzero(seen == wanted))
            if count > most or spec.keep == "last":
                most, kept = count, (view, seen)
            if count >= spec.min_pixels:
                break
        return kept

    def _check(self, image: np.ndarray | Picture, label: np.ndarray, name: str) -> None:
        height, width = image.shape[:2]
        if label.shape != (height, width):
            raise DataError(
                f"{name}: the label is {label.shape[1]}x{label.shape[0]}, the image "
                f"{width}x{height} (width x height); they must be equal"
            )
        if height < self.crop[0] or width < self.crop[1]:
            raise DataError(
                f"{name} is {width}x{height}, smaller than the crop of "
                f"{self.crop[1]}x{self.crop[0]} (width x height): set a smaller image_size in the "
                "pairing, or scale the images up"
            )
