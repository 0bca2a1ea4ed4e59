"""Masks and overlays of any photographs, from a trained run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mfuser.config.registry import Registry
from mfuser.data.images import UnreadableImage, read_image
from mfuser.engine.checkpoints import load_model
from mfuser.engine.console import Console
from mfuser.engine.decision import predict_ids
from mfuser.errors import DataError, MFuserError, placed
from mfuser.files import check_writable, clear_leftovers, replacing
from mfuser.model.sliding_window import check_window
from mfuser.reporting import draw

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given, and the images directly in folders. Raises DataError for what is missing."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise DataError(f"the folder {path} holds no images ({', '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image or folder {path}")
    return found


def predict(
    registry: Registry,
    run: Path,
    images: Sequence[Path],
    out: Path,
    *,
    settings: Sequence[str] = (),
    device: str | None = None,
    scale: float = 1.0,
    stride: tuple[int, int] | None = None,
    skip_unreadable: bool = False,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Writes NAME.mask.png (palette, index = class id) and NAME.overlay.png for every image.

    scale: resize images by this factor first. Returns, per image, its files and the share of
    pixels of each class.
    """
    console = console or Console()
    if not scale > 0 or not math.isfinite(scale):
        raise MFuserError(f"scale is a factor above 0, not {scale}")
    images = list(dict.fromkeys(images))
    names = file_names(images)
    sizes = _sizes(images, scale, skip_unreadable)
    check_writable(out)
    model, _ = load_model(run, registry, list(settings))
    for path, (height, width) in sizes.items():  # before anything is written
        with located(path):
            check_window((height, width), model.spec.image_size)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(where)
    out.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)
    table = draw.palette(model.classes)
    written: list[dict[str, Any]] = []
    with console.task("segmenting", len(images)) as task:
        for path, name in zip(images, names, strict=True):
            try:
                image = read_image(path)
            except UnreadableImage as error:
                if not skip_unreadable:
                    raise
                console.say(f"skipped: {error}")
                task.advance()
                continue
            label = _segment(model, path, image, where, scale, stride)
            mask, over = out / f"{name}.mask.png", out / f"{name}.overlay.png"
            try:
                # First the overlay: a mask never stands without its own.
                with replacing(mask) as unnamed:
                    draw.indexed(label, table).save(unnamed, "PNG")
                    draw.save(Image.fromarray(draw.overlay(image, label, table)), over)
            except OSError as error:
                raise DataError(f"{out} cannot be written: {error}") from error
            shares = np.bincount(label.ravel(), minlength=len(model.classes)) / label.size
            written.append(
                {
                    "image": str(path),
                    "mask": str(mask),
                    "overlay": str(over),
                    "classes": {
                        c: round(float(s), 4)
                        for c, s in zip(model.classes, shares, strict=True)
                        if s
                    },
                }
            )
            task.advance()
    if written:
        draw.save(draw.legend(model.classes, table, 640), out / "legend.png")
    return written


def _sizes(images: Sequence[Path], scale: float, skip: bool) -> dict[Path, tuple[int, int]]:
    """(height, width) that every readable image is segmented in; each is read to its end."""
    sizes = {}
    for path in images:
        try:
            sizes[path] = _scaled(read_image(path), scale)
        except UnreadableImage:
            if not skip:
                raise
    return sizes


def _scaled(image: np.ndarray, scale: float) -> tuple[int, int]:
    height, width = image.shape[:2]
    return max(1, round(height * scale)), max(1, round(width * scale))


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Errors name the image."""
    try:
        yield
    except MFuserError as error:
        raise placed(error, str(path)) from error


def _segment(
    model: Any,
    path: Path,
    image: np.ndarray,
    where: torch.device,
    scale: float,
    stride: tuple[int, int] | None,
) -> np.ndarray:
    height, width = image.shape[:2]
    size = _scaled(image, scale)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(where)
    if size != (height, width):
        pixels = torch.nn.functional.interpolate(
            pixels.float() / 255, size, mode="bilinear", align_corners=False, antialias=scale < 1
        )
    with located(path):
        scores = model.segment(pixels, stride=stride)
    return predict_ids(scores[0], (height, width))


def file_names(paths: Sequence[Path]) -> list[str]:
    """A name of its own for each: the file's, with as many of its folders as tell it apart."""
    names = [path.stem for path in paths]
    for depth in range(1, max((len(p.parts) for p in paths), default=0) + 1):
        count = Counter(names)
        twins = [i for i, name in enumerate(names) if count[name] > 1]
        if not twins:
            break
        for i in twins:
            names[i] = "_".join(part.strip("/\\:") for part in paths[i].parts[-depth:])
    count = Counter(names)
    return [f"{n}_{i}" if count[n] > 1 else n for i, n in enumerate(names)]
