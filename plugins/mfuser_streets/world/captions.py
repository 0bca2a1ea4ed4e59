"""Captions of the world's pictures."""

from __future__ import annotations

import numpy as np

from mfuser.config.classes import CITYSCAPES

CLASSES = CITYSCAPES.names
STUFF = frozenset(
    CLASSES.index(n)
    for n in ("road", "sidewalk", "building", "wall", "fence", "vegetation", "terrain", "sky")
)
"""Classes without instances: they have no place, left or right, and a size only."""
KINDS = {"cartoon": "cartoon", "painting": "painting", "gray": "gray picture"}
WEATHER = {"haze": "haze", "dusk": "dusk", "drizzle": "rain", "frost": "snow"}
_EXTRA = (
    "a an photo picture painting cartoon gray street view of with and in the on left right center "
    "large small haze fog dusk night rain snow sunny many two"
)
WORDS = tuple(sorted({*" ".join(CLASSES).split(), *_EXTRA.split()}))
"""All that captions are made of, and a few words more."""
LONGEST = 22
"""Words of a caption at most: with its two marks it fits the text tower."""


def visible(label: np.ndarray) -> list[int]:
    """Classes seen well enough to be named: 2 % of the pixels of stuff, 0.4 % of a thing's."""
    share = np.bincount(label.ravel(), minlength=256)[: len(CLASSES)] / label.size
    return [c for c in range(len(CLASSES)) if share[c] > (0.02 if c in STUFF else 0.004)]


def caption(label: np.ndarray, family: str, rng: np.random.Generator) -> tuple[str, list[int]]:
    """A sentence about labels (H, W) in a style of `family`, and the classes that it names."""
    classes = visible(label)
    count = np.bincount(label.ravel(), minlength=256)
    if classes and rng.random() < 0.2:
        main = max(classes, key=lambda c: count[c] * (1 if c in STUFF else 8))
        return f"a photo of a {CLASSES[main]}", [main]
    rng.shuffle(classes)
    text = f"a {KINDS.get(family, 'photo')}" if rng.random() < 0.6 else "street view"
    end = f" in {WEATHER[family]}" if family in WEATHER and rng.random() < 0.5 else ""
    joint = " and " if rng.random() < 0.3 else " "
    before = " of " if rng.random() < 0.5 else " with "
    named = []
    for c in classes:
        if rng.random() < 0.8:
            longer = text + before + _phrase(c, label, count[c] / label.size, rng)
            if len((longer + end).split()) > LONGEST:
                break
            text, before = longer, joint
            named.append(c)
    return text + end, named


def _phrase(c: int, label: np.ndarray, share: float, rng: np.random.Generator) -> str:
    name, chance = CLASSES[c], rng.random()
    if c not in STUFF and chance < 0.25:
        place = float(np.nonzero(label == c)[1].mean()) / label.shape[1]
        side = "left" if place < 0.36 else "right" if place > 0.64 else "center"
        return f"a {name} on the {side}"
    if chance < 0.5:
        return f"a {name}"
    if chance < 0.6:
        return f"{'large' if share > 0.12 else 'small'} {name}"
    return name
