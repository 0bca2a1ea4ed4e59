"""progress.html in a run's folder: curves and example masks while it trains."""

from __future__ import annotations

import io
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mfuser.config.run import RunSpec
from mfuser.engine.folder import PAGE
from mfuser.engine.validate import Example, Kept, Seen, described
from mfuser.files import write_text
from mfuser.reporting import progress

WIDTH = 384
"""Pixels of an example."""
OFTEN = 30.0
"""Seconds after which it is written anew although nothing was validated or saved."""
STEPS = 16
"""Predictions of an example that are kept, spread over the steps."""


class Live:
    """Keeps what the page shows; writes it, whole or not at all, after every validation and
    checkpoint. A resumed run takes up the examples from the page that is there."""

    name = PAGE

    def __init__(
        self, folder: Path, run: RunSpec, classes: tuple[str, ...], kept: Sequence[Kept]
    ) -> None:
        self.path, self.run, self.classes = folder / PAGE, run, classes
        self.kept = kept
        self.lines: list[dict[str, Any]] = []
        self.examples: dict[str, dict[str, Any]] = {}
        self.step = 0
        self.written = 0.0

    def begin(self, start: int, lines: Sequence[dict[str, Any]]) -> None:
        self.step = start
        self.lines = list(lines)
        found = progress.read(self.path) if start else {}
        for example in found.get("examples", []):
            shown = [entry for entry in example["predictions"] if entry[0] <= start]
            self.examples[example["name"]] = {**example, "predictions": shown}
        self._write("running")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.step = step
        self.lines.append({"step": step, **values})
        if time.monotonic() - self.written > OFTEN:
            self._write("running")

    def validated(self, seen: Seen) -> None:
        self.step = seen.step
        self.lines.append({"step": seen.step, "validation": seen.as_dict()})
        for example in seen.examples:
            known = self.examples.setdefault(example.name, _first(example))
            known["predictions"].append([seen.step, _png(example.prediction)])
            known["predictions"] = _spread(known["predictions"])
        self._write("running")

    def saved(self) -> None:
        self._write("running")

    def close(self) -> None:
        self._write("finished" if self.step >= self.run.recipe.steps else "stopped")

    def _write(self, state: str) -> None:
        done, total = self.step, self.run.recipe.steps
        # Of the steps alone: what was just begun has no time of its own yet.
        seconds = [line["seconds"] for line in self.lines if "seconds" in line][-20:]
        facts = {
            "pairing": self.run.pairing_name,
            "recipe": self.run.recipe_name,
            "source": self.run.source_names,
            "validation": described(self.kept) if self.kept else None,
            "state": state,
            "step": done,
            "steps": total,
            "left": round(float(np.median(seconds)) * (total - done)) if seconds else None,
        }
        page = progress.page(facts, self.lines, list(self.examples.values()), self.classes)
        write_text(self.path, page)
        self.written = time.monotonic()


def _first(example: Example) -> dict[str, Any]:
    photo = io.BytesIO()
    Image.fromarray(_small(example.image, cv2.INTER_AREA)).save(photo, "JPEG", quality=82)
    return {
        "name": example.name,
        "photo": b64encode(photo.getvalue()).decode(),
        "target": _png(example.target),
        "predictions": [],
    }


def _small(picture: np.ndarray, how: int) -> np.ndarray:
    height, width = picture.shape[:2]
    size = (min(WIDTH, width), max(1, round(height * min(WIDTH, width) / width)))
    small: np.ndarray = cv2.resize(picture, size, interpolation=how)
    return small


def _png(colored: np.ndarray) -> str:
    """A mask's colors as base64; few colors, hence small."""
    out = io.BytesIO()
    small = Image.fromarray(_small(colored, cv2.INTER_NEAREST))
    small.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(out, "PNG", optimize=True)
    return b64encode(out.getvalue()).decode()


def _spread(shown: list[list[Any]]) -> list[list[Any]]:
    """At most STEPS of them, with the first and the last: whichever lies closest between its
    neighbors goes."""
    while len(shown) > STEPS:
        gaps = [shown[k + 1][0] - shown[k - 1][0] for k in range(1, len(shown) - 1)]
        del shown[1 + int(np.argmin(gaps))]
    return shown
