"""Single images of an evaluation: a score for each, and the best and the worst to look at."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mfuser.engine.metrics import Confusion, scores
from mfuser.interfaces import IGNORE
from mfuser.reporting import draw
from mfuser.reporting.report import ImageScore

SHOWN = 3
"""Best and worst images of a domain that are kept to look at."""
WIDTH = 512


@dataclass(frozen=True)
class Shown:
    """One image to look at, small. photo: JPEG; target, prediction: PNGs whose gray level is the
    class id, 255 ignored; all as base64."""

    index: int
    score: ImageScore
    photo: str
    target: str
    prediction: str


@dataclass
class Gallery:
    """Fills up image by image; galleries of several processes add up."""

    scores: list[tuple[int, ImageScore]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    def add(
        self,
        index: int,
        name: str,
        image: np.ndarray,
        truth: np.ndarray,
        prediction: np.ndarray,
        scored: tuple[int, ...],
        num_classes: int,
    ) -> None:
        """One image (H, W, 3) with its target and prediction (h, w)."""
        counts = Confusion(num_classes)
        counts.add(truth, prediction)
        found = scores(counts.counts, scored)
        if not np.isfinite(found.miou):
            return  # nothing of it is labeled
        score = ImageScore(name=name, miou=found.miou, accuracy=found.accuracy)
        self.scores.append((index, score))
        if self._among(score):
            photo, target, mask = _small(image, truth, prediction)
            self.shown.append(Shown(index, score, photo, target, mask))
            self._trim()

    def extend(self, scores: Iterable[tuple[int, ImageScore]], shown: Iterable[Shown]) -> None:
        """Take in what other processes found."""
        self.scores = sorted(scores, key=lambda entry: entry[0])
        self.shown = list(shown)
        self._trim()

    def _among(self, score: ImageScore) -> bool:
        if len(self.shown) < 2 * SHOWN:
            return True
        known = sorted(entry.score.miou for entry in self.shown)
        return score.miou < known[SHOWN - 1] or score.miou > known[-SHOWN]

    def _trim(self) -> None:
        self.shown.sort(key=lambda entry: (entry.score.miou, entry.index))
        if len(self.shown) > 2 * SHOWN:
            self.shown = self.shown[:SHOWN] + self.shown[-SHOWN:]


def _small(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> tuple[str, str, str]:
    height, width = truth.shape
    size = (min(WIDTH, width), max(1, round(height * min(WIDTH, width) / width)))
    photo = Image.fromarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=82)
    masks = []
    for label in (truth, prediction):
        ids = np.where(label < 0, IGNORE, label).astype(np.uint8)
        ids = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
        file = io.BytesIO()
        Image.fromarray(ids).save(file, "PNG", optimize=True)
        masks.append(b64encode(file.getvalue()).decode())
    return b64encode(out.getvalue()).decode(), masks[0], masks[1]


def panel(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, table: np.ndarray
) -> list[np.ndarray]:
    return [
        image,
        draw.color(truth, table),
        draw.overlay(image, prediction, table),
        draw.color(np.where(truth == IGNORE, IGNORE, prediction), table),
    ]


COLUMNS = ("image", "truth", "prediction over image", "prediction")


def picture(domain: str) -> str:
    """The file of a domain's panels."""
    return re.sub(r"[^\w.+-]", "-", domain) + ".png"


def save_pictures(
    folder: Path, classes: tuple[str, ...], drawn: dict[str, list[list[np.ndarray]]]
) -> None:
    """A sheet of each domain, and an overview with one row of each."""
    for name, rows in drawn.items():
        save_panels(folder / picture(name), classes, {name: rows})
    save_panels(folder / "overview.png", classes, {n: rows[:1] for n, rows in drawn.items()})


def save_panels(
    path: Path, classes: tuple[str, ...], drawn: dict[str, list[list[np.ndarray]]]
) -> None:
    """Image, truth, overlay and prediction (void as in the truth), row by row, with a legend."""
    rows = [row for domain in drawn.values() for row in domain]
    if not rows:
        return
    names = [name for name, domain in drawn.items() for _ in domain]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = draw.panels(rows, COLUMNS, names=names)
    legend = draw.legend(draw.with_ids(classes), draw.palette(classes), sheet.width)
    draw.save(draw.stacked(sheet, legend), path)
