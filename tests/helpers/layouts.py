"""Stand-ins for datasets on disk: tiny images and labels in an official encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mfuser import Dataset

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
