"""Predictions as the BRAVO challenge's server takes them (valeoai/bravo_challenge, its README).

bravo_synrain/ulm/ulm_000000_000019_leftImg8bit.png ->
    OUT/bravo_synrain/ulm/ulm_000000_000019_leftImg8bit_pred.png     8 bits, Cityscapes' train ids
                                                   .._conf.png     16 bits, the confidence
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mfuser.config.classes import CITYSCAPES
from mfuser.errors import DataError, MFuserError
from mfuser.reporting import draw

PREFIX = "bravo_"


def check(classes: Sequence[str]) -> None:
    """Raises MFuserError for a model whose ids the server does not understand."""
    if tuple(classes) != CITYSCAPES.names:
        raise MFuserError(
            f"the BRAVO challenge takes the {len(CITYSCAPES.names)} classes of Cityscapes, and the "
            f"model has {len(classes)} others: {', '.join(classes[:3])}, …"
        )


def place(image: Path) -> Path:
    """Where the server expects an image: its path from the folder bravo_… on.

    Raises DataError for an image that lies in none.
    """
    parts = image.absolute().parts
    found = next((n for n, part in enumerate(parts[:-1]) if part.startswith(PREFIX)), None)
    if found is None:
        raise DataError(
            f"{image} lies in no folder {PREFIX}…; --scores bravo is for the challenge's images as "
            "unpacked (bravo_ACDC, bravo_synrain, …)"
        )
    return Path(*parts[found:])


def write(out: Path, image: Path, label: np.ndarray, confidence: np.ndarray) -> dict[str, str]:
    """The two files of an image. label: (H, W) ids. confidence: (H, W) in [0, 1]."""
    target = out / place(image)
    target.parent.mkdir(parents=True, exist_ok=True)
    steps = np.minimum(np.floor(confidence.astype(np.float64) * 65536), 65535).astype(np.uint16)
    files: dict[str, tuple[Path, np.ndarray]] = {
        "prediction": (target.with_name(f"{target.stem}_pred.png"), label.astype(np.uint8)),
        "confidence": (target.with_name(f"{target.stem}_conf.png"), steps),
    }
    for path, pixels in files.values():
        draw.save(Image.fromarray(pixels), path)
    return {kind: str(path) for kind, (path, _) in files.items()}
