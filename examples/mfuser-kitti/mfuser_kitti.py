"""KITTI's semantic benchmark (Alhaija et al., IJCV 2018): 200 labeled frames of Karlsruhe."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np
from mfuser import IGNORE, DataError, Dataset, DatasetSpec, Sample, hookimpl
from mfuser.config.classes import CITYSCAPES
from mfuser.data.images import read_image, read_label
from PIL import Image

mfuser_requires = ">=0.1,<0.2"

IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The Cityscapes id of each of the 19 train ids, in their order; all others are ignored."""


class Kitti(Dataset):
    """training/image_2/*.png and the labels of the same names in training/semantic."""

    classes = CITYSCAPES.names
    class_ids = tuple(range(19))

    def __init__(self, root: Path) -> None:
        folder = root / "training" / "image_2"
        self.images = sorted(folder.glob("*.png"))
        if not self.images:
            raise DataError(f"kitti: there are no PNG files in {folder}")
        for image in self.images:
            if not self._label(image).is_file():
                raise DataError(f"kitti: {image} has no label {self._label(image)}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_image(self.images[index]), self.label(index), self.name(index))

    def name(self, index: int) -> str:
        return self.images[index].stem

    def label(self, index: int) -> np.ndarray:
        path = self._label(self.images[index])
        raw = read_label(path)
        if raw.ndim != 2 or raw.max(initial=0) > 33:
            raise DataError(f"{path} is not a label of Cityscapes ids (0 to 33)")
        table = np.full(256, IGNORE, np.int64)
        table[list(IDS)] = range(19)
        return table[raw]

    def image_file(self, index: int) -> Path:
        return self.images[index]

    def fingerprint(self) -> str:
        files = [f for image in self.images for f in (image, self._label(image))]
        state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return sha256(repr(state).encode()).hexdigest()

    @staticmethod
    def _label(image: Path) -> Path:
        return image.parents[1] / "semantic" / image.name


class KittiSpec(DatasetSpec, name="kitti"):
    """KITTI's semantic benchmark: 200 labeled frames, without an official split."""

    def build(self, root: Path | None, split: str) -> Kitti:
        """Raises DataError that says what is missing."""
        if root is None:
            raise DataError("kitti: give its folder: --data-root kitti=FOLDER")
        dataset = Kitti(Path(root))
        dataset.test_size = self.test_size
        return dataset

    @classmethod
    def write_example(cls, root: Path) -> None:
        rng = np.random.default_rng(0)
        for folder, shape, top in (("image_2", (30, 99, 3), 256), ("semantic", (30, 99), 34)):
            (root / "training" / folder).mkdir(parents=True)
            for i in range(2):
                picture = Image.fromarray(rng.integers(0, top, shape, np.uint8))
                picture.save(root / "training" / folder / f"{i:06d}_10.png")


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [KittiSpec]
