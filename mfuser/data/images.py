"""Reading images and labels, with errors that name the file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mfuser.data import png
from mfuser.errors import DataError


class UnreadableImage(DataError):
    """An image or label file that is missing, damaged or in an unknown format."""


def read_image(path: Path, upright: bool = False) -> np.ndarray:
    """The image as uint8 (H, W, 3) RGB, the first one of several.

    upright: turned as its EXIF orientation says, as viewers show it; else pixels as stored.
    Gray images are repeated over the channels; 9 to 16 bits are brought to 8 by the bits that are
    used (12 of a camera's 16, say); floats are taken from [0, 1]; transparency is dropped. Raises
    UnreadableImage naming the file, also where it is cut short or holds anything else.
    """
    depth, color = _png_format(path)
    if depth == 8 and color != png.PALETTE and not upright:
        stored = png.opened(_bytes(path))
        if stored is not None:
            found = stored.rgb(slice(0, stored.height), slice(0, stored.width))
            if found is not None:
                return found
    if depth == 16 and color in (2, 6):
        # Pillow would keep the high byte, which is all black where 12 bits are used.
        return _eight_bits(_read_png16(path)[..., :3], path)
    image = _load(path)
    try:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return np.repeat(_eight_bits(np.asarray(image), path)[..., None], 3, axis=2)
        if image.mode in ("La", "RGBa"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except BROKEN as error:
        raise UnreadableImage(
            f"{path}: its pixels ({image.mode}) cannot be turned into RGB: {error}; save it as PNG "
            "or JPEG"
        ) from error


def _eight_bits(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Pixels of 16 or 32 bits, or floats in [0, 1] -> uint8."""
    least, most = (pixels.min(), pixels.max()) if pixels.size else (0, 0)
    if pixels.dtype.kind == "f" and least >= 0 and most <= 1:
        levels: np.ndarray = np.rint(pixels * 255)
        return levels.astype(np.uint8)
    if pixels.dtype.kind != "f" and least >= 0 and most < 65536:
        bits = max(8, int(most).bit_length())
        high = np.asarray(pixels.astype(np.uint16) >> (bits - 8))
        return high.astype(np.uint8)
    kind = "float" if pixels.dtype.kind == "f" else "32-bit"
    raise UnreadableImage(
        f"{path}: {kind} pixels from {least:g} to {most:g} are not a photograph's: floats lie in "
        "[0, 1], integers in 0 to 65535; save it with 8 or 16 bits"
    )


def read_label(path: Path) -> np.ndarray:
    """The label as stored: (H, W), or (H, W, channels) in the order R, G, B.

    Palette images give the index, never the color; 16-bit files keep all 16 bits. Raises
    UnreadableImage naming the file, truncated ones included.
    """
    depth, color = _png_format(path)
    if depth == 16 and color in (2, 6):
        # Pillow would keep the high byte only: every class of SYNTHIA becomes 0.
        return _read_png16(path)
    if depth == 8 and color in (png.GRAY, png.PALETTE):
        stored = png.opened(_bytes(path))
        found = None if stored is None else stored.corner(stored.height, stored.width)
        if found is not None:
            return found
    image = _load(path)
    array = np.array(image)
    if array.dtype == bool:
        return array.astype(np.uint8)
    if color == 0 and depth in (2, 4):
        # Pillow stretches gray levels of 2 and 4 bits to 0..255; ids must stay as they are.
        return array // np.uint8(255 // (2**depth - 1))
    return array


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from the file's header alone. Raises UnreadableImage."""
    try:
        with Image.open(path) as image:
            return image.size
    except BROKEN as error:
        raise unreadable(path, error) from error


BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Exceptions that Pillow raises on damaged files."""


def _load(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        with image:
            image.load()
        return image
    except BROKEN as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UnreadableImage:
    """The error in words, for what was raised on reading a file."""
    if isinstance(error, FileNotFoundError):
        return UnreadableImage(f"there is no file {path}")
    if isinstance(error, UnidentifiedImageError):
        reason = (
            "it is empty" if path.stat().st_size == 0 else "it is not an image in a known format"
        )
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UnreadableImage(f"{path} cannot be read: {reason}; restore it from the dataset")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def _png_format(path: Path) -> tuple[int, int]:
    """(bits per sample, color type) of a PNG file; (0, 0) of any other."""
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(head) < 26 or head[:8] != png.SIGNATURE or head[12:16] != b"IHDR":
        return (0, 0)
    return head[24], head[25]


def _read_png16(path: Path) -> np.ndarray:
    """A 16-bit color PNG as uint16 (H, W, channels), R first."""
    import cv2

    data = path.read_bytes()
    try:
        for _ in png.chunks(data):  # OpenCV returns half an image without any error
            pass
    except png.Damaged as error:
        raise unreadable(path, error) from error
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise UnreadableImage(f"{path} cannot be read: damaged PNG; restore it from the dataset")
    if array.dtype != np.uint16 or array.ndim != 3:
        raise UnreadableImage(f"{path} cannot be read as a 16-bit color PNG")
    swapped: np.ndarray = array.copy()
    swapped[..., :3] = array[..., 2::-1]
    return swapped
