"""The content of the page of `mfuser serve` for an image, computed without any page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser.engine import photographs
from mfuser.engine.decision import probabilities
from mfuser.engine.exhaustion import explained
from mfuser.engine.inputs import VIDEOS
from mfuser.engine.photographs import located
from mfuser.engine.similarity import similarity
from mfuser.errors import MFuserError
from mfuser.inference import Inference
from mfuser.model.dgss import DGSSModel
from mfuser.model.sliding_window import Sliding
from mfuser.reporting import draw

LONGEST = 2048
"""Pixels of the longer side that a photograph is shown and segmented with, at most."""
SMALLER = "--longest-side 1024; --device cpu where there is more memory than on the GPU"
"""Remedies when memory runs out."""


@dataclass(frozen=True)
class Seen:
    """Pictures (H, W, 3), uint8. shares: class -> share of the pixels, the largest first.
    size: (height, width) of the file."""

    overlay: np.ndarray
    mask: np.ndarray
    confidence: np.ndarray
    shares: dict[str, float]
    certainty: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Likeness:
    """picture: (H, W, 3), uint8, from the least (dark) to the most like the text (bright).
    least, most: cosines."""

    picture: np.ndarray
    least: float
    most: float


class Viewer:
    """A model that answers for one photograph after the other, as `mfuser predict` would."""

    def __init__(
        self,
        model: DGSSModel,
        name: str,
        where: torch.device,
        inference: Inference | None = None,
        longest: int = LONGEST,
    ) -> None:
        self.model, self.name, self.where = model.to(where).eval(), name, where
        self.inference, self.longest = inference or Sliding(), longest
        self.table = draw.palette(model.classes)

    @property
    def reads_text(self) -> bool:
        return self.model.encoder.vlm is not None

    def look(self, path: Path) -> Seen:
        """Raises MFuserError for a file that is not an image, naming it, and OutOfMemoryError."""
        image, size = self._image(path)
        pixels = self._pixels(image)
        size_read = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        classes = len(self.model.classes)
        with located(path), explained(self.inference, size_read, classes, SMALLER):
            scores = self.model.segment_by(self.inference, pixels)
        shares = probabilities(scores[0], image.shape[:2], None, self.model.decoder.scores)
        label = shares.argmax(0).cpu().numpy()
        confidence = shares.amax(0).cpu().numpy()
        counts = np.bincount(label.ravel(), minlength=len(self.model.classes)) / label.size
        found = {self.model.classes[k]: float(counts[k]) for k in np.argsort(-counts) if counts[k]}
        return Seen(
            overlay=draw.overlay(image, label, self.table),
            mask=draw.color(label, self.table),
            confidence=draw.heat(confidence, 0, 1),
            shares=found,
            certainty=float(confidence.mean()),
            size=size,
        )

    def compare(self, path: Path, text: str) -> Likeness:
        """How much each place of a photograph is like a text. Raises MFuserError for a text that
        the model does not take."""
        image, _ = self._image(path)
        with located(path):
            found = similarity(self.model, self._pixels(image), [text])
        height, width = image.shape[:2]
        cosines = F.interpolate(found, (height, width), mode="bilinear", align_corners=False)
        values = cosines[0, 0].float().cpu().numpy()
        least, most = float(values.min()), float(values.max())
        over = 0.35 * image + 0.65 * draw.heat(values, least, most)
        return Likeness(over.round().astype(np.uint8), least, most)

    def _pixels(self, image: np.ndarray) -> Tensor:
        return photographs.pixels(image, "auto", self.model.spec.image_size, self.where)

    def _image(self, path: Path) -> tuple[np.ndarray, tuple[int, int]]:
        """As it is shown, and the size (height, width) of what the file holds."""
        if path.suffix.lower() in VIDEOS:
            raise MFuserError(f"{path} is a video: mfuser predict writes its masks")
        image = photographs.read(path)
        height, width = image.shape[:2]
        factor = self.longest / max(height, width)
        if factor < 1:
            small = (max(1, round(width * factor)), max(1, round(height * factor)))
            image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        return image, (height, width)
