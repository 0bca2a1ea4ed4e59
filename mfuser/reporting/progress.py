"""The page on which a training is watched: one HTML file, no network, no server."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfuser.reporting.draw import palette
from mfuser.reporting.page import PLACE, embedded, framed

POINTS = 400
"""Most points of a curve; of longer ones, each point is the mean of several steps."""
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)


def page(
    facts: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    classes: tuple[str, ...],
) -> str:
    """facts: about the run and how far it is. lines: of its log. examples: "name", "photo" (JPEG),
    "target" (PNG) and "predictions" ([step, PNG]), as base64."""
    table = palette(classes)
    trained = [line for line in lines if "validation" not in line]
    names = [n for n in dict.fromkeys(n for line in trained for n in line) if n != "step"]
    data = {
        "facts": facts,
        "curves": {n: _thin([(e["step"], e[n]) for e in trained if n in e]) for n in names},
        "validation": [
            {"step": line["step"], **line["validation"]} for line in lines if "validation" in line
        ],
        "examples": list(examples),
        "classes": [[name, *(int(v) for v in table[k])] for k, name in enumerate(classes)],
    }
    return framed("progress.html").replace(PLACE, embedded(data))


def read(path: Path) -> dict[str, Any]:
    """The data that a page shows; nothing if there is no page or it was edited."""
    try:
        found = DATA.search(path.read_text("utf-8"))
        data = json.loads(found[1]) if found else {}
        sound = all(
            isinstance(e["name"], str) and all(isinstance(p[0], int) for p in e["predictions"])
            for e in data.get("examples", [])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}
    return data if sound else {}


def _thin(points: Sequence[tuple[int, float]]) -> list[list[float]]:
    share = max(1, -(-len(points) // POINTS))
    parts = [points[k : k + share] for k in range(0, len(points), share)]
    return [[part[-1][0], sum(v for _, v in part) / len(part)] for part in parts]
