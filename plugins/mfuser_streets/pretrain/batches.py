"""Batches for pretraining, drawn as they are needed: batch `step` follows from (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from mfuser_streets.geometry import Scene
from mfuser_streets.layout import draw_scene
from mfuser_streets.world import space
from mfuser_streets.world.captions import CLASSES, caption, visible
from mfuser_streets.world.scenes import edges, log_depth, picture, shrunk

PATCH = 8
CROP = (8, 16)
"""Patches (rows, columns) of a crop for the losses on images alone."""
WORDS_CROP = (5, 10)
"""The same for crops with captions."""
GRID = (12, 24)
"""The position table; crops sit at a random place in it."""
DEPTHS, EDGES = 4, 16
"""Numbers a patch that stand for its depth (2x2 means) and edges (4x4 maxima)."""
PAIRS_A_SCENE, CROPS_A_SCENE = 2, 8
_SHIFT = (2, 5)
_FOCUS = np.array([
    {"truck": 4.0, "bus": 5.0, "train": 4.0, "fence": 2.0, "wall": 1.5, "terrain": 1.5,
     "rider": 1.5, "motorcycle": 1.5, "bicycle": 1.5}.get(name, 1.0)
    for name in CLASSES
])  # fmt: skip
"""How often a class is drawn for a crop where it is present: more where that is seldom."""


@dataclass
class Pairs:
    """Crops of the same scenes in two styles, shifted by `shift` patches (rows, columns).

    first, second: uint8 (B, H, W, 3), mirrored where `mirrored`. geometry: float32 (B, patches,
    20) of `first`: log depth, then edges. masks: bool (2, B, patches), what each crop hides.
    places: where in the position table the two sit.
    """

    first: np.ndarray
    second: np.ndarray
    mirrored: tuple[bool, bool]
    shift: tuple[int, int]
    geometry: np.ndarray
    masks: np.ndarray
    places: tuple[tuple[int, int], tuple[int, int]]


@dataclass
class Captioned:
    """images: uint8 (B, H, W, 3). texts: a caption each. tags: float32 (B, classes), 1 for classes
    that are somewhere in the crop. place: where in the position table the crops sit."""

    images: np.ndarray
    texts: list[str]
    tags: np.ndarray
    place: tuple[int, int]


def _scene(rng: np.random.Generator, scale: float) -> tuple[Scene, str, space.Box]:
    """A street of the pretraining space, `scale` times the size of the position table."""
    names = tuple(space.PRETRAINING)
    name = names[rng.integers(len(names))]
    box = space.PRETRAINING[name]
    size = (int(GRID[0] * scale) * PATCH, int(GRID[1] * scale) * PATCH)
    return draw_scene(rng, box.view, size, 2, box.city), name, box


def _place(rng: np.random.Generator, crop: tuple[int, int]) -> tuple[int, int]:
    return (
        int(rng.integers(0, GRID[0] - crop[0] + 1)),
        int(rng.integers(0, GRID[1] - crop[1] + 1)),
    )


def pairs(seed: int, step: int, count: int) -> Pairs:
    """`count` pairs of crops."""
    rng = np.random.default_rng([seed, 1, step])
    h, w = CROP
    mirrored = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    dy, dx = (int(rng.integers(-s, s + 1)) for s in _SHIFT)
    first, second, geometry = [], [], []
    others = tuple(space.PRETRAINING.values())
    for _ in range(-(-count // PAIRS_A_SCENE)):
        scene, _, box = _scene(rng, float(rng.choice((1.0, 1.0, 1.25, 1.5))))
        a = picture(scene, box, rng)
        b = picture(scene, others[rng.integers(len(others))], rng)
        depth = log_depth(scene)
        edge = edges(scene, depth)
        rows, columns = a.shape[0] // PATCH, a.shape[1] // PATCH
        for _ in range(PAIRS_A_SCENE):
            y = int(rng.integers(max(0, -dy), rows - h - max(0, dy) + 1))
            x = int(rng.integers(max(0, -dx), columns - w - max(0, dx) + 1))
            here, there = _window(y, x, CROP), _window(y + dy, x + dx, CROP)
            first.append(_mirror(a[here], mirrored[0]))
            second.append(_mirror(b[there], mirrored[1]))
            geometry.append(
                _geometry(_mirror(depth[here], mirrored[0]), _mirror(edge[here], mirrored[0]))
            )
    return Pairs(
        np.stack(first[:count]),
        np.stack(second[:count]),
        mirrored,
        (dy, dx),
        np.stack(geometry[:count]),
        np.stack([_masks(rng, count), _masks(rng, count)]),
        (_place(rng, CROP), _place(rng, CROP)),
    )


def _window(y: int, x: int, crop: tuple[int, int]) -> tuple[slice, slice]:
    """Pixels of `crop` patches from patch (y, x) on."""
    return (
        slice(y * PATCH, (y + crop[0]) * PATCH),
        slice(x * PATCH, (x + crop[1]) * PATCH),
    )


def _mirror(values: np.ndarray, mirrored: bool) -> np.ndarray:
    return np.ascontiguousarray(values[:, ::-1]) if mirrored else values


def _geometry(depth: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """(H, W) each -> (patches, 20): depths about 0 with deviation 1, edges 0 or 1."""
    h, w = CROP
    near = (shrunk(np.ascontiguousarray(depth), PATCH // 2) - 2.5) / 1.3
    depths = near.reshape(h, 2, w, 2).transpose(0, 2, 1, 3).reshape(h * w, DEPTHS)
    cells = edge.reshape(h * 4, 2, w * 4, 2).max((1, 3))
    found = cells.reshape(h, 4, w, 4).transpose(0, 2, 1, 3).reshape(h * w, EDGES)
    return np.concatenate([depths, found], 1).astype(np.float32)


def _masks(rng: np.random.Generator, count: int, share: float = 0.25) -> np.ndarray:
    """(count, patches): blocks of patches that hide at least `share` of each crop."""
    h, w = CROP
    hidden = np.zeros((count, h, w), bool)
    for mask in hidden:
        while mask.mean() < share:
            a, b = rng.integers(1, 4), rng.integers(1, 5)
            y, x = rng.integers(0, h - a + 1), rng.integers(0, w - b + 1)
            mask[y : y + a, x : x + b] = True
    return hidden.reshape(count, h * w)


def captioned(seed: int, step: int, count: int) -> Captioned:
    """`count` crops with captions; seven in ten have a class somewhere in them that was drawn
    first, so that rare classes are seen as often as common ones."""
    rng = np.random.default_rng([seed, 2, step])
    h, w = WORDS_CROP[0] * PATCH, WORDS_CROP[1] * PATCH
    images: list[np.ndarray] = []
    texts, tags = [], np.zeros((count, len(CLASSES)), np.float32)
    while len(images) < count:
        scene, family, box = _scene(rng, float(rng.choice((0.75, 1.0, 1.0, 1.25))))
        image, label = picture(scene, box, rng), scene.label()
        height, width = label.shape
        present = np.unique(label)
        present = present[present < len(CLASSES)]
        chances = _FOCUS[present] / _FOCUS[present].sum()
        for _ in range(min(CROPS_A_SCENE, count - len(images))):
            if rng.random() < 0.7:
                ys, xs = np.nonzero(label == rng.choice(present, p=chances))
                k = rng.integers(len(ys))
                y = int(np.clip(ys[k] - h * rng.random(), 0, height - h))
                x = int(np.clip(xs[k] - w * rng.random(), 0, width - w))
            else:
                y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            crop, there = image[y : y + h, x : x + w], label[y : y + h, x : x + w]
            mirrored = bool(rng.random() < 0.5)
            text, _ = caption(_mirror(there, mirrored), family, rng)
            tags[len(images), visible(there)] = 1
            images.append(_mirror(crop, mirrored))
            texts.append(text)
    return Captioned(np.stack(images), texts, tags, _place(rng, WORDS_CROP))


def one_thread() -> None:
    """OpenCV on one thread, for the whole process."""
    cv2.setNumThreads(1)
