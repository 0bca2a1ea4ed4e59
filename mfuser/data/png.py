"""The upper left part of a PNG file, at the cost of that part.

A PNG is one compressed stream of rows, each of them filtered by the pixels to its left and above
(PNG specification, third edition, sections 9 and 10). So what lies below a window need not be
inflated, and what lies to its right need not be unfiltered. ISA-L inflates (zlib, where it is not
installed: the same bytes, slower); libpng, through OpenCV, unfilters: it is handed a file of that
part alone, whose rows are stored without compression.

Whatever is unusual gives None, and Pillow's to read: this is a shortcut for the files that
datasets are made of, never another opinion of what a file holds.
"""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"

GRAY, RGB, PALETTE, RGBA = 0, 2, 3, 6
"""Color types."""

_SAMPLES = {GRAY: 1, RGB: 3, PALETTE: 1, RGBA: 4}
_UNUSUAL = frozenset({b"acTL", b"tRNS"})
"""Chunks of animated files, and of those where a color or gray level stands for transparency."""
_LONGEST = 1 << 20
"""Bytes of a chunk beside the pixels; Pillow refuses files for longer texts."""
_BLOCK = 65535
"""Most bytes of a stored block (RFC 1951, section 3.2.4)."""

_HEAD = b"\0\0\0\x0dIHDR"
"""Length and kind of the first chunk."""


def _inflater() -> Any:
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:
        return zlib


inflater: Any = _inflater()
"""zlib, or what does the same faster."""


class Damaged(ValueError):
    """Says in words what is wrong with a file."""


@dataclass(frozen=True)
class Chunk:
    """kind: four letters. start, stop: of its data, in the file."""

    kind: bytes
    start: int
    stop: int


def chunks(data: bytes) -> Iterator[Chunk]:
    """The chunks of a PNG file up to its last, each checked. Raises Damaged."""
    place, kind = len(SIGNATURE), b""
    view = memoryview(data)
    while kind != b"IEND":
        if place + 12 > len(data):
            raise Damaged("the file is truncated")
        (length,) = struct.unpack_from(">I", data, place)
        start = place + 8
        kind, stop = data[place + 4 : start], start + length
        place = stop + 4
        if place > len(data):
            raise Damaged("the file is truncated")
        (stored,) = struct.unpack_from(">I", data, stop)
        if inflater.crc32(view[start - 4 : stop]) != stored:
            raise Damaged(f"its {kind.decode('latin-1')!r} chunk is damaged")
        yield Chunk(kind, start, stop)


@dataclass(frozen=True)
class Stored:
    """A PNG file of 8 bits per sample, not interlaced, whose chunks are whole.

    color: its color type. parts: where its compressed rows lie in `data`.
    """

    data: bytes
    width: int
    height: int
    color: int
    parts: tuple[Chunk, ...]

    def corner(self, rows: int, columns: int) -> np.ndarray | None:
        """The first rows and columns, (rows, columns) or (rows, columns, 3 or 4) as OpenCV orders
        channels (B, G, R, A); the indices of a palette. None where the stream is not as it ought
        to be."""
        import cv2

        samples = _SAMPLES[self.color]
        full, used = 1 + samples * self.width, 1 + samples * columns
        packed = b"".join(memoryview(self.data)[part.start : part.stop] for part in self.parts)
        try:
            raw = inflater.decompressobj().decompress(packed, rows * full)
        except inflater.error:
            return None
        if len(raw) < rows * full:
            return None
        lines = np.frombuffer(raw, np.uint8).reshape(rows, full)
        if lines[:, 0].max() > 4:  # no such filter
            return None
        # To the bytes and their filters, an index is a gray level.
        color = GRAY if self.color == PALETTE else self.color
        head = struct.pack(">IIBBBBB", columns, rows, 8, color, 0, 0, 0)
        part = raw if used == full else lines[:, :used].tobytes()
        pixels = _chunk(b"IDAT", *_stored(part))
        file = b"".join([SIGNATURE, *_chunk(b"IHDR", head), *pixels, *_chunk(b"IEND")])
        try:
            found: np.ndarray | None = cv2.imdecode(
                np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED
            )
        except cv2.error:
            return None
        return found

    def rgb(self, rows: slice, columns: slice) -> np.ndarray | None:
        """A window, uint8 (H, W, 3) RGB; transparency is dropped."""
        import cv2

        found = self.corner(rows.stop, columns.stop)
        if found is None:
            return None
        conversion = {
            GRAY: cv2.COLOR_GRAY2RGB,
            RGB: cv2.COLOR_BGR2RGB,
            RGBA: cv2.COLOR_BGRA2RGB,
        }[self.color]
        window: np.ndarray = cv2.cvtColor(found[rows, columns], conversion)
        return window


def opened(data: bytes) -> Stored | None:
    """None for anything but a plain, undamaged PNG file."""
    if len(data) < 33 or data[:8] != SIGNATURE or data[8:16] != _HEAD:
        return None
    width, height, depth, color, *ways = struct.unpack_from(">IIBBBBB", data, 16)
    if depth != 8 or color not in _SAMPLES or any(ways) or not width or not height:
        return None
    if Image.MAX_IMAGE_PIXELS is None or width * height > Image.MAX_IMAGE_PIXELS:
        return None  # Pillow warns of it, or refuses
    parts: list[Chunk] = []
    try:
        for chunk in chunks(data):
            if chunk.kind == b"IDAT":
                if parts and chunk.start != parts[-1].stop + 12:
                    return None
                parts.append(chunk)
            elif chunk.kind in _UNUSUAL or chunk.stop - chunk.start > _LONGEST:
                return None
    except Damaged:
        return None
    return Stored(data, width, height, color, tuple(parts)) if parts else None


def _chunk(kind: bytes, *parts: bytes | memoryview) -> list[bytes | memoryview]:
    crc = inflater.crc32(kind)
    for part in parts:
        crc = inflater.crc32(part, crc)
    return [struct.pack(">I", sum(map(len, parts))), kind, *parts, struct.pack(">I", crc)]


def _stored(raw: bytes) -> list[bytes | memoryview]:
    """A zlib stream that holds `raw` as it is."""
    out: list[bytes | memoryview] = [b"\x78\x01"]
    view = memoryview(raw)
    for start in range(0, len(raw), _BLOCK):
        block = view[start : start + _BLOCK]
        last = start + _BLOCK >= len(raw)
        out += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    return [*out, struct.pack(">I", inflater.adler32(raw))]
