"""A folder of some forty files of every kind, as people keep them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


def photo(path: Path, size: tuple[int, int] = (120, 80), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(rng.random(size[::-1], dtype=np.float32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
    image.save(path)
    return path


@dataclass(frozen=True)
class Odd:
    """Names of files. usable: images from the window's size up. small: images below it. broken:
    those that cannot be read. passed: no images by their names, or nothing that ends. hidden: not
    to be looked at."""

    usable: tuple[str, ...]
    small: tuple[str, ...]
    broken: tuple[str, ...]
    passed: tuple[str, ...]
    hidden: tuple[str, ...]


def odd_files(folder: Path) -> Odd:
    usable = {"rgb.jpg": "RGB", "gray.png": "L", "cmyk.jpg": "CMYK", "la.png": "LA", "p.gif": "P",
              "bit.bmp": "1", "deep.tif": "I;16", "a b ü.webp": "RGB", "t.tga": "RGBA",
              "pnm.ppm": "RGB", "ico.png": "RGBA", "dds.png": "P", "SHOUT.JPG": "RGB",
              "float.tiff": "F", "lab.tif": "LAB", "ycc.jpeg": "YCbCr",
              os.fsdecode(b"caf\xe9.png"): "RGB", "new\nline.png": "RGB"}  # fmt: skip
    for name, mode in usable.items():
        photo(folder / name, mode=mode)
    os.replace(folder / "ycc.jpeg", folder / "really-a-jpeg.png")
    small = {f"small{k}.png": (k, 3) for k in (1, 5, 95)}
    for name, size in small.items():
        photo(folder / name, size)
    whole = (folder / "rgb.jpg").read_bytes()
    broken = {"empty.jpg": b"", "text.png": b"hello", "cut.jpg": whole[:900], "html.gif": b"<html>",
              "zeros.tif": bytes(4000), "half.webp": (folder / "a b ü.webp").read_bytes()[:200],
              "nan.tif": b"II*\0\xff\xff\xff\xff", "bmp.bmp": b"BM" + bytes(60)}  # fmt: skip
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    passed = ("notes.txt", "Thumbs.db", "doc.pdf", "x.heic", "archive.zip", "noending")
    for name in passed:
        (folder / name).write_bytes(b"?")
    os.mkfifo(folder / "pipe.png")
    (folder / ".DS_Store").write_bytes(b"")
    os.symlink("nowhere.png", folder / "dangling.png")
    (folder / "folder.png").mkdir()
    names = {*usable} - {"ycc.jpeg"} | {"really-a-jpeg.png"}
    return Odd(
        tuple(sorted(names)),
        tuple(small),
        (*broken, "dangling.png"),
        (*passed, "pipe.png"),
        (".DS_Store",),
    )
