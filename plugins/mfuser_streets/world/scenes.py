"""Scenes and pictures of the world, each from (seed, split, index) alone."""

from __future__ import annotations

import cv2
import numpy as np

from mfuser_streets.geometry import Scene
from mfuser_streets.layout import draw_scene
from mfuser_streets.render import render
from mfuser_streets.world import space

WORLD_VERSION = 1
"""Raised whenever the same (seed, index, domain) gives another picture; weights say on which
version they were pretrained."""

SOURCE = "game"
PRETRAINING = "space"
DEVELOPMENT = "development"
DOMAINS = (SOURCE, *space.TARGETS, PRETRAINING, DEVELOPMENT)
SPLITS = ("train", "val")

_STREETS = {SOURCE: 0, DEVELOPMENT: 2, PRETRAINING: 3}
"""Streams of random streets; the targets share one, in other weather, and no two others do."""
_TARGET_STREETS = 1


def family(domain: str, index: int) -> tuple[str, space.Box]:
    """Name and box of image `index` of a domain: families take turns."""
    if domain == SOURCE:
        return SOURCE, space.SOURCE
    if domain in space.TARGETS:
        return domain, space.TARGETS[domain]
    boxes = space.PRETRAINING if domain == PRETRAINING else space.DEVELOPMENT
    names = tuple(boxes)
    name = names[index % len(names)]
    return name, boxes[name]


def rng(seed: int, split: str, stream: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), stream, index])


def scene(seed: int, split: str, domain: str, index: int, size: tuple[int, int]) -> Scene:
    """The street of image `index`, `size` (height, width) pixels, yet without color."""
    _, box = family(domain, index)
    # Small images are drawn finer, so that thin things keep their smooth edges.
    supersample = 3 if size[0] < 160 else 2
    stream = _STREETS.get(domain, _TARGET_STREETS)
    return draw_scene(rng(seed, split, stream, index), box.view, size, supersample, box.city)


def picture(
    scene: Scene,
    box: space.Box,
    generator: np.random.Generator,
    fixed: dict[str, float] | None = None,
) -> np.ndarray:
    """uint8 (H, W, 3): the scene in a style drawn from the box, `fixed` parameters as given."""
    point = box.draw(generator) | (fixed or {})
    return render(scene, space.style(point), generator)


def log_depth(scene: Scene) -> np.ndarray:
    """float32 (H, W): the logarithm of meters, at most those of the horizon (400)."""
    camera = scene.camera
    ids = scene.pixels()
    h, w = ids.shape
    f = camera.focal * h
    right = (np.arange(w, dtype=np.float32) + 0.5 - camera.center * w) / np.float32(f)
    up = ((camera.horizon * h - np.arange(h, dtype=np.float32) - 0.5) / np.float32(f))[:, None]
    inverse = scene.plane[:, 0].take(ids) * right + scene.plane[:, 1].take(ids) * up
    inverse += scene.plane[:, 2].take(ids)
    return -np.log(np.clip(inverse, np.float32(1 / 400), np.float32(1 / 0.4)))


def edges(scene: Scene, depth: np.ndarray) -> np.ndarray:
    """float32 (H, W) of 0 and 1: where what is seen changes its material or jumps in depth."""
    material = scene.material.take(scene.pixels())
    found = np.zeros(material.shape, np.float32)
    found[1:] = (material[1:] != material[:-1]) | (abs(depth[1:] - depth[:-1]) > 0.3)
    across = (material[:, 1:] != material[:, :-1]) | (abs(depth[:, 1:] - depth[:, :-1]) > 0.3)
    found[:, 1:] = np.maximum(found[:, 1:], across)
    return found


def shrunk(values: np.ndarray, factor: int) -> np.ndarray:
    """float32 (H, W) averaged over squares of `factor` pixels."""
    h, w = values.shape
    return cv2.resize(values, (w // factor, h // factor), interpolation=cv2.INTER_AREA)
