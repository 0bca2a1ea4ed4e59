"""Images that are decoded in part: the same pixels as Pillow gives for the whole file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mfuser.data import png
from mfuser.data.images import UnreadableImage, read_image, read_label
from mfuser.data.lookup import ByteTable
from mfuser.data.pictures import open_picture
from mfuser.data.transforms import View, view_image

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    base = left + up - corner
    far = [abs(base - other) for other in (left, up, corner)]
    return np.where(
        (far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner)
    )


def filtered(pixels: np.ndarray, kinds: np.ndarray) -> bytes:
    """(H, W, samples) uint8 as the rows of a PNG file, each with its own filter."""
    height, width, samples = pixels.shape
    wide = np.zeros((height + 1, width + 1, samples), np.int64)
    wide[1:, 1:] = pixels
    left, up, corner = wide[1:, :-1], wide[:-1, 1:], wide[:-1, :-1]
    guesses = [0 * left, left, up, (left + up) // 2, paeth(left, up, corner)]
    rows = [
        bytes([kind]) + ((pixels[k] - guesses[kind][k]) % 256).astype(np.uint8).tobytes()
        for k, kind in enumerate(kinds)
    ]
    return b"".join(rows)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(pixels: np.ndarray, color: int, rng: np.random.Generator) -> bytes:
    """A PNG file with all filters, its pixels in several chunks."""
    height, width = pixels.shape[:2]
    rows = filtered(pixels, rng.integers(0, 5, height))
    stream = zlib.compress(rows, int(rng.integers(0, 10)))
    cuts = [0, *sorted(rng.integers(0, len(stream), 2).tolist()), len(stream)]
    out = png.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))
    if color == 3:
        out += chunk(b"PLTE", rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    out += chunk(b"tEXt", b"Software\0a test")
    out += b"".join(chunk(b"IDAT", stream[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
    return out + chunk(b"IEND", b"")


def pillow(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("inflater", ["isal", "zlib"])
@pytest.mark.parametrize("color", SAMPLES)
def test_windows_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, color: int, inflater: str
) -> None:
    if inflater == "zlib":
        monkeypatch.setattr(png, "inflater", zlib)
    else:
        pytest.importorskip("isal")
        assert png.inflater is not zlib
    path = tmp_path / "a.png"
    for seed in range(12):
        rng = np.random.default_rng(seed)
        height, width = (int(n) for n in rng.integers(1, 90, 2))
        shape = height, width, SAMPLES[color]
        # Smooth and noisy ones; the noisy last rows need more than a block of 65535 bytes.
        steps = rng.integers(0, 4, shape).cumsum(1) if seed % 2 else rng.integers(0, 256, shape)
        pixels = np.tile(steps.astype(np.uint8), (1, 1 + 9 * (seed == 4), 1))
        path.write_bytes(encoded(pixels, color, rng))
        whole, width = pillow(path), pixels.shape[1]
        assert np.array_equal(read_image(path), whole)
        if color in (0, 3):
            label = read_label(path)
            assert np.array_equal(label, pixels[..., 0]) and label.flags.writeable
        picture = open_picture(path)
        if color in (3, 4):
            assert picture is None  # palettes, gray with transparency: Pillow's to read
            continue
        assert picture is not None and picture.shape == whole.shape
        for _ in range(4):
            top, left = int(rng.integers(height)), int(rng.integers(width))
            rows = slice(top, int(rng.integers(top, height)) + 1)
            columns = slice(left, int(rng.integers(left, width)) + 1)
            assert np.array_equal(picture[rows, columns], whole[rows, columns])


def odd_files(folder: Path) -> list[Path]:
    """Files that only Pillow reads, and those of which it reads but the first or a part."""
    rng = np.random.default_rng(3)
    color = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(color)
    image.save(folder / "transparent.png", transparency=tuple(color[0, 0].tolist()))
    image.save(folder / "animated.png", save_all=True, append_images=[Image.fromarray(255 - color)])
    image.convert("1").save(folder / "bits.png")
    Image.fromarray(color[..., 0].astype(np.uint16) * 200).save(folder / "gray16.png")
    cv2.imwrite(str(folder / "color16.png"), color.astype(np.uint16) * 99)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").save(folder / "gray.jpg")
    image.save(folder / "a.bmp")
    plain = encoded(color, 2, rng)
    interlaced = bytearray(plain)  # its rows are not what Adam7 has: no reader takes it for plain
    interlaced[28] = 1
    interlaced[29:33] = struct.pack(">I", zlib.crc32(interlaced[12:29]))
    (folder / "interlaced.png").write_bytes(interlaced)
    (folder / "cut.png").write_bytes(plain[: len(plain) // 2])
    (folder / "no_end.png").write_bytes(plain[:-12])
    for name, place in (("early", 60), ("middle", len(plain) // 2), ("sum", len(plain) - 14)):
        damaged = bytearray(plain)
        damaged[place] ^= 16
        (folder / f"{name}.png").write_bytes(damaged)
    (folder / "none.png").write_bytes(b"")
    (folder / "gone.png").unlink(missing_ok=True)
    return [*sorted(folder.iterdir()), folder / "gone.png"]


def outcome(path: Path, read: object) -> object:
    try:
        return read(path).tolist()  # type: ignore[operator]
    except UnreadableImage as error:
        return str(error)


def test_odd_files_are_left_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = odd_files(tmp_path)
    assert [path.name for path in files if open_picture(path) is not None] == []
    found = [outcome(path, read) for path in files for read in (read_image, read_label)]
    monkeypatch.setattr(png, "opened", lambda data: None)
    assert found == [outcome(path, read) for path in files for read in (read_image, read_label)]
    assert sum(isinstance(one, str) for one in found) >= 6


def test_streams_that_are_too_short_or_of_no_filter_are_left_to_pillow(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = filtered(rng.integers(0, 256, (9, 7, 3)), np.full(9, 1))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 9, 8, 2, 0, 0, 0))
    for raw in (rows[:-30], b"\x07" + rows[1:], b"no zlib"):
        stream = raw if raw == b"no zlib" else zlib.compress(raw)
        file = png.SIGNATURE + head + chunk(b"IDAT", stream) + chunk(b"IEND", b"")
        stored = png.opened(file)
        assert stored is not None and stored.rgb(slice(0, 9), slice(0, 7)) is None
        path = tmp_path / "a.png"
        path.write_bytes(file)
        picture = open_picture(path)
        assert picture is not None
        with pytest.raises(UnreadableImage, match=r"a\.png cannot be read"):
            picture[slice(0, 9), slice(0, 7)]


def test_jpeg_is_decoded_at_the_size_that_is_needed(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:301, 0:405]
    ramp = np.stack([columns / 2, rows / 2 + 20, (rows + columns) / 4], -1)
    Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / "a.jpg", quality=98)
    whole, picture = pillow(tmp_path / "a.jpg"), open_picture(tmp_path / "a.jpg")
    assert picture is not None
    half = View((200, 270), 30, 40, (100, 120))  # 0.66: as a whole
    assert picture.reduced(half.scaled) is None
    assert np.array_equal(view_image(picture, half), view_image(whole, half))
    for factor, part in ((0.5, 2), (0.3, 2), (0.25, 4), (0.12, 8)):
        scaled = int(301 * factor), int(405 * factor)
        reduced = picture.reduced(scaled)
        assert reduced is not None and reduced[1] == (301 / part, 405 / part)
        assert reduced[0].shape == (-(-301 // part), -(-405 // part), 3)
        view = View(scaled, 3, 5, (scaled[0] - 3, scaled[1] - 8))
        # A ramp has the same values at the same places, however it was decoded.
        difference = view_image(picture, view).astype(int) - view_image(whole, view)
        assert np.abs(difference).max() <= 4 and abs(difference.mean()) < 0.3
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableImage, match=r"a\.jpg cannot be read"):
        picture.reduced((75, 100))


def test_byte_table_equals_the_table_or_refuses() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    for lacking in (0, 1, 100, 256):
        table = rng.permutation(256)
        table[rng.permutation(256)[:lacking]] = -1
        mapped = ByteTable(table)(label)
        if (table[label] < 0).any():
            assert mapped is None
        else:
            assert mapped is not None and np.array_equal(mapped, table[label])
        known = np.array(np.flatnonzero(table >= 0)[:1], np.uint8)[None]
        found = ByteTable(table)(known)
        assert found is not None and np.array_equal(found, table[known])
