"""Draw docs/architecture.svg from the code: `python docs/draw_architecture.py`.

Floors are those of the import contract in pyproject.toml, arrows the imports between rooms that
the code has today, purposes the first sentences of the rooms' docstrings. An arrow that two others
imply is left out. `tests/docs/test_architecture.py` holds the picture against the code.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
FRAMEWORK = "mfuser"
BESIDE = {
    "mfuser_plugins": "plugins/mfuser_plugins",
    "mfuser_streets": "plugins/mfuser_streets",
    "mfuser_kernels": "kernels/mfuser_kernels",
}
"""Packages beside the framework, and their folders."""

WIDTH, BOX, HIGH, GAP, SIDE = 1180, 250, 74, 36, 270
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.name { font-weight: 600; font-size: 14px }
.note { fill: #57606a }
.room { fill: #f6f8fa; stroke: #8c959f }
.method { fill: #ddf4ff; stroke: #54aeff }
.frame { fill: none; stroke: #d0d7de; stroke-dasharray: 6 4 }
.arrow { fill: none; stroke: #8c959f; stroke-width: 1.2; marker-end: url(#head) }
.entry { fill: none; stroke: #bf8700; stroke-width: 1.4; stroke-dasharray: 5 4;
         marker-end: url(#head) }
"""


def floors() -> list[list[str]]:
    """Rooms of the framework, from the top floor to the ground, as the import contract says."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    return [re.split(r"\s*[|:]\s*", layer) for layer in layers]


def arrows(rooms: list[str]) -> list[tuple[str, str]]:
    """(room, room it imports), without those that others imply."""
    graph = grimp.build_graph(FRAMEWORK, *BESIDE, exclude_type_checking_imports=True)
    homes = {f"{FRAMEWORK}.{room}": room for room in rooms}
    direct: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules:
        room = homes.get(".".join(module.split(".")[:2]))
        for imported in graph.find_modules_directly_imported_by(module):
            other = homes.get(".".join(imported.split(".")[:2]))
            if room is not None and other is not None and room != other:
                direct[room].add(other)

    def reached(room: str) -> set[str]:
        found: set[str] = set()
        for other in direct[room]:
            found |= {other} | reached(other)
        return found

    return sorted(
        (room, other)
        for room, others in direct.items()
        for other in others
        if not any(other in reached(between) for between in others - {other})
    )


def purpose(path: Path) -> str:
    """The first sentence of a module's or package's docstring, up to a colon where it is long."""
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split())
    sentence = re.split(r"(?<=[.])\s", text)[0].rstrip(".").replace("`", "")
    return sentence if len(sentence) <= 100 else sentence.split(":")[0]


def drawing() -> str:
    """The picture, as SVG."""
    layers = floors()
    places: dict[str, tuple[float, float]] = {}
    parts: list[str] = []
    room_side = WIDTH - SIDE
    for level, rooms in enumerate(layers):
        y = 60 + level * (HIGH + GAP)
        spread = (room_side - len(rooms) * BOX) / (len(rooms) + 1)
        for k, room in enumerate(rooms):
            places[room] = (spread + k * (BOX + spread), y)
    for room, other in arrows(list(places)):
        parts.append(_arrow(places[room], places[other]))
    for room, place in places.items():
        kind = "method" if room == "model" else "room"
        parts += _box(place, room, purpose(ROOT / FRAMEWORK / room), kind)
    bottom = 60 + len(layers) * (HIGH + GAP)
    x = room_side + 10
    beside = {
        "mfuser_plugins": places["model"][1],
        "mfuser_streets": places["plugins"][1],
        "mfuser_kernels": places["shapes"][1],
    }
    top = beside["mfuser_plugins"]
    for below in ("mfuser_streets", "mfuser_kernels"):
        bend = x + BOX + (8 if below == "mfuser_kernels" else 0)
        start, end = top + HIGH, beside[below]
        if below == "mfuser_streets":
            parts.append(f'<path class="arrow" d="M{x + BOX / 2} {start} V{end - 2}"/>')
        else:
            parts.append(
                f'<path class="arrow" d="M{x + BOX - 20} {start} V{start + 14} H{bend} '
                f'V{end - 16} H{x + BOX - 20} V{end - 2}"/>'
            )
    left, right = places["plugins"], places["interfaces"]
    parts.append(
        f'<path class="entry" d="M{left[0] + BOX} {left[1] + 20} '
        f'C{x - 200} {left[1] - 40} {x - 60} {top + HIGH / 2} {x - 2} {top + HIGH / 2}"/>'
        f'<text class="note" x="{x - 130}" y="{top + HIGH + 24}">finds by entry point</text>'
    )
    parts.append(
        f'<path class="arrow" d="M{x + 16} {top + HIGH} V{right[1] - 14} '
        f'H{places["specs"][0] + BOX - 30} V{right[1] - 2}"/>'
        f'<text class="note" x="{x - 132}" y="{right[1] - 20}">imports by public name</text>'
    )
    for name, y in beside.items():
        parts += _box((x, y), name, purpose(ROOT / BESIDE[name]), "room")
    frame = f'<rect class="frame" x="6" y="34" width="{room_side - 12}" height="{bottom - 44}"/>'
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#8c959f"/></marker>'
    )
    title = (
        '<text class="note" x="14" y="24">mfuser: every arrow is an import, and points down</text>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" '
            f'width="{WIDTH}" height="{bottom}">',
            f"<style>{STYLE}</style><defs>{head}</defs>",
            f'<rect width="{WIDTH}" height="{bottom}" fill="white"/>',
            title,
            frame,
            *parts,
            "</svg>\n",
        ]
    )


def _box(place: tuple[float, float], name: str, text: str, kind: str) -> list[str]:
    x, y = place
    lines = textwrap.wrap(text, 37)[:3]
    return [
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{BOX}" height="{HIGH}" rx="6"/>',
        f'<text class="name" x="{x + 10:g}" y="{y + 20:g}">{escape(name)}</text>',
        *(
            f'<text class="note" x="{x + 10:g}" y="{y + 36 + 14 * k:g}">{escape(line)}</text>'
            for k, line in enumerate(lines)
        ),
    ]


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A curve from the foot of one box to the head of another."""
    x0, y0 = start[0] + BOX / 2, start[1] + HIGH
    x1, y1 = end[0] + BOX / 2, end[1] - 2
    aside = 0.35 * (y1 - y0)
    x0 += max(-90.0, min(90.0, 0.3 * (x1 - x0)))
    x1 += max(-90.0, min(90.0, 0.3 * (x0 - x1)))
    return (
        f'<path class="arrow" d="M{x0:g} {y0:g} C{x0:g} {y0 + aside:g} {x1:g} {y1 - aside:g} '
        f'{x1:g} {y1:g}"/>'
    )


if __name__ == "__main__":
    PICTURE.write_text(drawing(), "utf-8")
