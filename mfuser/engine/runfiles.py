"""The files of a run's folder that hold weights, and which of them is meant."""

from __future__ import annotations

import json
from pathlib import Path

from mfuser.errors import CheckpointError

RUN = "run.json"
LAST = "last.safetensors"
PREVIOUS = "previous.safetensors"
FINAL = "model.safetensors"
AVERAGED = "averaged.safetensors"
BEST = "best.safetensors"
HOLDING = {
    None: (AVERAGED, FINAL, LAST, PREVIOUS),
    "last": (FINAL, LAST, PREVIOUS),
    "averaged": (AVERAGED, LAST, PREVIOUS),
    "best": (BEST,),
}
"""The files of a run that hold weights of a kind, by preference; None: those to be evaluated."""


def find(path: Path, weights: str | None = None) -> Path:
    """The checkpoint in a run folder: the finished model, else the last one saved."""
    if path.is_dir():
        weights = weights or _asked(path)
        for name in HOLDING[weights]:
            if (path / name).is_file():
                return path / name
        if weights is not None and any((path / name).is_file() for name in HOLDING[None]):
            raise without(path, weights)
        raise CheckpointError(f"{path} holds no run: neither {FINAL} nor {LAST} is there")
    if not path.exists():
        raise CheckpointError(f"there is no run folder or checkpoint {path}")
    return path


def holds_run(path: Path) -> bool:
    """Whether it is a run folder, or a file that may be a checkpoint."""
    if path.is_dir():
        return any((path / name).is_file() for name in (FINAL, LAST, PREVIOUS))
    return path.suffix == ".safetensors"


def _asked(folder: Path) -> str | None:
    """The weights that a run's recipe wants to be taken, if it says so."""
    try:
        said = json.loads((folder / RUN).read_text("utf-8"))["recipe"]["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no folder; one from before; whatever is wrong with it is said elsewhere
    return said if said in HOLDING else None


def without(path: Path, weights: str) -> CheckpointError:
    """The error for a run or a file that does not hold them."""
    reason = {
        "averaged": ": its recipe averages none (ema)",
        "best": ": its recipe measures none while it trains (validate_every), or has not yet",
    }.get(weights, "")
    return CheckpointError(f"{path} does not hold the {weights} weights{reason}")
