"""Street scenes drawn on the fly: a source and five shifted domains, without a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from mfuser import Dataset, DatasetSpec, Sample, hookimpl
from mfuser.config.classes import CITYSCAPES
from mfuser.specs import ImageSize

if TYPE_CHECKING:
    from mfuser_streets.geometry import Scene
    from mfuser_streets.styles import DomainName

COUNT = {"train": 2000, "val": 100}
VERSION = 1
"""Raised whenever the same index gives another picture."""

Domain = Literal["game", "camera", "fog", "night", "rain", "snow", "shifted"]


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV on one thread: images are small, and loaders run several processes."""
    import cv2

    threads = cv2.getNumThreads()
    if threads == 1:
        yield
        return
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


class Streets(Dataset):
    """Image `index` depends on (seed, domain, split, index) alone, so any process can draw it.

    Scenes of different splits, and of the source and the shifted domains, come from different
    seeds: none is ever seen twice. The shifted domains share their streets and cameras, as the
    adverse conditions of ACDC share theirs with its reference images.
    """

    classes: tuple[str, ...] = CITYSCAPES.names
    class_ids: tuple[int, ...] = tuple(range(len(CITYSCAPES.names)))

    def __init__(
        self,
        domain: Domain,
        size: tuple[int, int],
        count: int,
        seed: int,
        split: str,
        keep: bool = False,
    ) -> None:
        self.domain, self.size, self.count, self.seed, self.split = domain, size, count, seed, split
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if keep else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        index = self._index(index)
        if self._kept is None:
            return self._draw(index)
        if index not in self._kept:
            sample = self._draw(index)
            # Labels fit a byte: a kept 96x192 scene takes 74 kB.
            self._kept[index] = sample.image, sample.label.astype(np.uint8)
        image, label = self._kept[index]
        return Sample(image.copy(), label.astype(np.int64), self.name(index))

    def _draw(self, index: int) -> Sample:
        from mfuser_streets.render import render
        from mfuser_streets.styles import DOMAIN, DOMAINS

        with _one_thread():
            scene, domain = self._scene(index)
            rng = self._rng(100 + DOMAINS.index(domain), index)
            image = render(scene, DOMAIN[domain].style(rng), rng)
            return Sample(image, scene.label(), self.name(index))

    def name(self, index: int) -> str:
        return f"{self.domain}_{self.split}_{self.seed}_{self._index(index):05d}"

    def label(self, index: int) -> np.ndarray:
        """int64 (H, W), without coloring the scene."""
        with _one_thread():
            return self._scene(index)[0].label()

    def fingerprint(self) -> str:
        height, width = self.size
        scenes = f"{self.domain}:{self.split}:{self.seed}:{self.count}"
        return f"streets-{VERSION}:{scenes}:{height}x{width}"

    def _index(self, index: int) -> int:
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} of a dataset of {self.count} images")
        return index % self.count

    def _rng(self, stream: int, index: int) -> np.random.Generator:
        split = list(COUNT).index(self.split)
        return np.random.default_rng([self.seed, split, stream, self._index(index)])

    def _scene(self, index: int) -> tuple[Scene, DomainName]:
        from mfuser_streets.layout import draw_scene
        from mfuser_streets.styles import DOMAIN, SHIFTED

        domain = (
            SHIFTED[self._index(index) % len(SHIFTED)] if self.domain == "shifted" else self.domain
        )
        world = DOMAIN[domain]
        # Small images are drawn finer, so that thin things keep their smooth edges.
        supersample = 3 if self.size[0] < 160 else 2
        rng = self._rng(world.world, index)
        return draw_scene(rng, world.view, self.size, supersample), domain


class StreetsSpec(DatasetSpec, name="streets"):
    """Street scenes with the 19 Cityscapes classes, drawn on the fly.

    domain: "game" (clean and saturated, the source) or a shifted domain: "camera" (another
        camera and palette, with grain, blur and noise), and that camera in "fog", at "night", in
        "rain" and "snow"; "shifted" stands for all five.
    size: (height, width) in pixels. count: images; by default 2000 to train on, 100 to test on.
    seed: another one gives other streets. keep: hold what was drawn in memory, for small sets that
        are read many times.
    """

    needs_root: ClassVar[bool] = False
    tiny: ClassVar[Mapping[str, Any]] = {"size": (48, 80), "count": 3}
    variant: ClassVar[str | None] = "domain"

    domain: Domain = "game"
    size: ImageSize = (256, 512)
    count: PositiveInt | None = None
    seed: NonNegativeInt = 0
    keep: bool = False

    def build(self, root: Path | None, split: str) -> Streets:
        split = self.split or split
        count = self.count or COUNT[split]
        dataset = Streets(self.domain, self.size, count, self.seed, split, self.keep)
        dataset.test_size = self.test_size
        return dataset

    def expand(self) -> list[DatasetSpec]:
        """All five shifted domains for "shifted"."""
        from mfuser_streets.styles import SHIFTED

        if self.domain != "shifted":
            return [self]
        return [self.model_copy(update={"domain": domain}) for domain in SHIFTED]

    def label(self) -> str:
        return f"{self.component()}:{self.domain}"


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [StreetsSpec]
