"""The recipes the shipped towers were pretrained by."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mfuser.errors import MFuserError, suggest

Tower = Literal["vfm", "vlm"]


@dataclass(frozen=True)
class Recipe:
    """How a tower is pretrained. Every batch follows from (seed, step) alone."""

    tower: Tower
    seed: int
    steps: int
    decay: int
    """Last steps, over which the learning rate falls to 0; before them it does not depend on
    `steps`, so a longer run begins as a shorter one."""
    warm_start: int = 0
    """First steps of the VLM, on the VFM's losses: its own start, never the VFM's weights."""
    refresh: int = 0
    """After the warm start, every so many steps one is on the losses of the warm start again, so
    that words do not wash out what makes features alike across styles; 0: none."""
    lr: float = 1e-3
    warmup: int = 60
    weight_decay: float = 0.05
    clip: float = 1.0
    pairs: int = 20
    """Pairs of crops a batch, for the losses on images alone."""
    captions: int = 160
    """Crops with captions a batch."""
    contrast: float = 1.0
    masked: float = 0.5
    geometry: float = 1.0
    words: float = 0.5
    """Weights of the losses: patches across styles, masked patches, depth and edges, class words.
    The loss between images and captions has weight 1."""

    def on_words(self, step: int) -> bool:
        """Whether a step trains on captions and words, not on pairs of crops."""
        after = step - self.warm_start
        if self.tower == "vfm" or after < 0:
            return False
        return not self.refresh or after % self.refresh != self.refresh - 1

    def rate(self, step: int) -> float:
        """The learning rate of a step: warmup, a plateau, then linearly down to 0."""
        falling = (self.steps - step) / self.decay if self.decay else 1.0
        return self.lr * min(1.0, (step + 1) / self.warmup, falling)

    def as_json(self) -> dict[str, Any]:
        """Without `refresh` where there is none, as files from before it say nothing of it."""
        return {k: v for k, v in asdict(self).items() if k != "refresh" or v}


RECIPES: dict[Tower, Recipe] = {
    "vfm": Recipe("vfm", seed=5, steps=5000, decay=800),
    "vlm": Recipe("vlm", seed=6, steps=4700, decay=1000, warm_start=2000, refresh=3),
}


def recipe(tower: Tower, **changes: Any) -> Recipe:
    """A tower's recipe with some of its numbers changed.

    Raises MFuserError for a number that a recipe does not have, or a decay longer than the run.
    """
    known = asdict(RECIPES[tower])
    for name in changes:
        if name not in known:
            raise MFuserError(f"a pretraining recipe has no '{name}'{suggest(name, known)}")
    changed = replace(RECIPES[tower], **changes)
    if not 0 <= changed.decay <= changed.steps or changed.steps < 1:
        raise MFuserError(
            f"steps = {changed.steps}, decay = {changed.decay}: the learning rate falls over the "
            "last `decay` of `steps` steps"
        )
    return changed
