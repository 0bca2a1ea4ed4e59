"""Masks as colors, overlays, and panels beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from mfuser.config.classes import CITYSCAPES
from mfuser.errors import legible
from mfuser.files import replacing
from mfuser.interfaces import IGNORE


def palette(classes: Sequence[str]) -> np.ndarray:
    """(256, 3) uint8: Cityscapes' colors by name, others spread over the hues; 255 black."""
    known = dict(zip(CITYSCAPES.names, CITYSCAPES.colors, strict=True))
    table = np.zeros((256, 3), np.uint8)
    for k, name in enumerate(classes):
        hue = int(255 * (k * 0.618034 % 1))
        spread = np.asarray(Image.new("HSV", (1, 1), (hue, 190, 220)).convert("RGB"))[0, 0]
        table[k] = known.get(name, spread)
    table[IGNORE] = 0
    return table


def color(label: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(H, W) ids -> (H, W, 3) uint8."""
    colored: np.ndarray = table[label]
    return colored


def overlay(
    image: np.ndarray, label: np.ndarray, table: np.ndarray, share: float = 0.55
) -> np.ndarray:
    """The image with its mask over it; ignored pixels stay as they are."""
    mixed = image * (1 - share) + table[label] * share
    return np.where((label == IGNORE)[..., None], image, mixed).astype(np.uint8)


def indexed(label: np.ndarray, table: np.ndarray) -> Image.Image:
    """A palette PNG whose index is the class id."""
    picture = Image.fromarray(label.astype(np.uint8), mode="P")
    picture.putpalette(table.flatten().tolist())
    return picture


def panels(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    width: int = 384,
    names: Sequence[str] = (),
) -> Image.Image:
    """Rows of pictures (uint8, HWC) under column titles, each scaled to `width`; `names` of rows
    are written into their first picture."""
    gap, head = 4, 18
    tiles = [[scaled(p, width) for p in row] for row in rows]
    columns = max(len(row) for row in tiles)
    height = head + sum(max(t.height for t in row) + gap for row in tiles)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, height - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (width + gap) + 2, 3), title, fill="black")
    y = head
    for i, row in enumerate(tiles):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * (width + gap), y))
        if i < len(names):
            name = legible(names[i])
            box = pen.textbbox((4, y + 3), name)
            pen.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill="black")
            pen.text((4, y + 3), name, fill="white")
        y += max(t.height for t in row) + gap
    return sheet


def stacked(*sheets: Image.Image) -> Image.Image:
    """Pictures below each other."""
    width = max(s.width for s in sheets)
    sheet = Image.new("RGB", (width, sum(s.height for s in sheets)), "white")
    y = 0
    for part in sheets:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet


def scaled(picture: np.ndarray, width: int) -> Image.Image:
    """(H, W, 3) uint8 as a picture of that width."""
    image = Image.fromarray(picture)
    return image.resize(
        (width, round(image.height * width / image.width)),
        Image.Resampling.NEAREST if image.width < width else Image.Resampling.BILINEAR,
    )


def with_ids(classes: Sequence[str]) -> list[str]:
    """Names for a legend of masks, whose values are the ids."""
    return [f"{k} {name}" for k, name in enumerate(classes)]


def legend(classes: Sequence[str], table: np.ndarray, width: int) -> Image.Image:
    """Colored squares with class names, as many to a line as fit."""
    cell, line = 120, 18
    columns = max(1, width // cell)
    rows = -(-len(classes) // columns)
    sheet = Image.new("RGB", (width, rows * line + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for k, name in enumerate(classes):
        x, y = (k % columns) * cell + 2, (k // columns) * line + 3
        pen.rectangle((x, y, x + 12, y + 12), fill=tuple(int(c) for c in table[k]))
        pen.text((x + 17, y + 1), name, fill="black")
    return sheet


def heat(values: np.ndarray, least: float, most: float) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8: dark blue at `least`, yellow at `most` (viridis)."""
    shares = (values - least) / max(most - least, 1e-12)
    levels = np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)
    colored: np.ndarray = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return np.ascontiguousarray(colored)


def scale_bar(least: float, most: float, width: int) -> Image.Image:
    """The colors of `heat` with the values at their ends."""
    sheet = Image.new("RGB", (width, 34), "white")
    ramp = np.linspace(least, most, max(2, width - 8))[None].repeat(12, 0)
    sheet.paste(Image.fromarray(heat(ramp, least, most)), (4, 4))
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 19), f"{least:.2f}", fill="black")
    end = f"{most:.2f}"
    pen.text((width - 4 - pen.textlength(end), 19), end, fill="black")
    return sheet


def beside(parts: Sequence[Image.Image | None], width: int, gap: int = 4) -> Image.Image:
    """Pictures under the columns of `panels`; None: nothing under that one."""
    height = max((p.height for p in parts if p is not None), default=0)
    sheet = Image.new("RGB", (len(parts) * (width + gap) - gap, height), "white")
    for column, part in enumerate(parts):
        if part is not None:
            sheet.paste(part, (column * (width + gap), 0))
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")
