"""Street scenes drawn on the fly: the miniature world's domains, without a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, field_validator

from mfuser import Dataset, DatasetSpec, MFuserError, Sample, hookimpl
from mfuser.config.classes import CITYSCAPES
from mfuser.specs import ImageSize

COUNT = {"train": 2000, "val": 100}
SOURCE = "game"
TARGETS = ("camera", "fog", "night", "rain", "snow")
"""The domains that "shifted" stands for; a test holds them to those of the world."""

Domain = Literal[
    "game", "camera", "fog", "night", "rain", "snow", "shifted", "space", "development"
]
_STYLES = 100
"""Added to a domain's number: the stream of random numbers that its styles are drawn from."""


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
        style: Mapping[str, float] | None = None,
    ) -> None:
        self.domain, self.size, self.count, self.seed, self.split = domain, size, count, seed, split
        self.style = dict(style or {})
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
        from mfuser_streets.world import scenes

        domain = self._domain(index)
        with _one_thread():
            scene = scenes.scene(self.seed, self.split, domain, index, self.size)
            _, box = scenes.family(domain, index)
            stream = _STYLES + scenes.DOMAINS.index(domain)
            rng = scenes.rng(self.seed, self.split, stream, index)
            image = scenes.picture(scene, box, rng, self.style)
            return Sample(image, scene.label(), self.name(index))

    def name(self, index: int) -> str:
        return f"{self.domain}_{self.split}_{self.seed}_{self._index(index):05d}"

    def label(self, index: int) -> np.ndarray:
        """int64 (H, W), without coloring the scene."""
        from mfuser_streets.world import scenes

        index = self._index(index)
        with _one_thread():
            domain = self._domain(index)
            return scenes.scene(self.seed, self.split, domain, index, self.size).label()

    def fingerprint(self) -> str:
        from mfuser_streets.world.scenes import WORLD_VERSION

        height, width = self.size
        shown = f"{self.domain}:{self.split}:{self.seed}:{self.count}:{height}x{width}"
        style = ",".join(f"{k}={v}" for k, v in sorted(self.style.items()))
        return f"streets-world{WORLD_VERSION}:{shown}{':' + style if style else ''}"

    def _index(self, index: int) -> int:
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} of a dataset of {self.count} images")
        return index % self.count

    def _domain(self, index: int) -> str:
        return TARGETS[index % len(TARGETS)] if self.domain == "shifted" else self.domain


class StreetsSpec(DatasetSpec, name="streets"):
    """Street scenes of the miniature world with the 19 Cityscapes classes, drawn on the fly.

    domain: "game" (clean and saturated, the source) or a shifted domain: "camera" (other cities,
        another camera and palette, with grain, blur and noise), and that camera in "fog", at
        "night", in "rain" and "snow"; "shifted" stands for all five. "space" is what the towers
        in miniature were pretrained on, "development" what to make choices on.
    size: (height, width) in pixels. count: images; by default 2000 to train on, 100 to test on.
    seed: another one gives other streets. keep: hold what was drawn in memory, for small sets that
        are read many times. style: parameters of the style that are fixed instead of drawn, e.g.
        {fog = 0.03, night = 0.9}; docs/world.md lists them and their ranges.
    """

    needs_root: ClassVar[bool] = False
    tiny: ClassVar[Mapping[str, Any]] = {"size": (48, 80), "count": 3}
    variant: ClassVar[str | None] = "domain"

    domain: Domain = "game"
    size: ImageSize = (256, 512)
    count: PositiveInt | None = None
    seed: NonNegativeInt = 0
    keep: bool = False
    style: dict[str, float] = {}

    @field_validator("style")
    @classmethod
    def _in_the_space(cls, value: dict[str, float]) -> dict[str, float]:
        if value:
            from mfuser_streets.world.space import check

            for name, number in value.items():
                try:
                    check(name, number)
                except MFuserError as error:
                    raise ValueError(str(error)) from error
        return value

    def build(self, root: Path | None, split: str) -> Streets:
        split = self.split or split
        count = self.count or COUNT[split]
        dataset = Streets(self.domain, self.size, count, self.seed, split, self.keep, self.style)
        dataset.test_size = self.test_size
        return dataset

    def expand(self) -> list[DatasetSpec]:
        """All five shifted domains for "shifted"."""
        if self.domain != "shifted":
            return [self]
        return [self.model_copy(update={"domain": domain}) for domain in TARGETS]

    def label(self) -> str:
        return f"{self.component()}:{self.domain}"


@hookimpl
def mfuser_components() -> list[type[DatasetSpec]]:
    return [StreetsSpec]
