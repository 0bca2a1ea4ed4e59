"""Reading images and labels of every encoding that datasets come in."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mfuser.data.images import UnreadableImage, image_size, read_image, read_label

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (7, 11, 3), dtype=np.uint8)
IDS = RNG.integers(0, 35, (7, 11), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)  # type: ignore[arg-type]
    return path


def test_image_is_rgb(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", COLOR))
    assert image.dtype == np.uint8 and image.flags.writeable
    assert (image == COLOR).all()
    assert image_size(tmp_path / "a.png") == (11, 7)


def test_jpeg_is_close(tmp_path: Path) -> None:
    smooth = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    image = read_image(save(tmp_path / "a.jpg", smooth, quality=95))
    assert np.abs(image.astype(int) - smooth).max() <= 4  # one flat color survives JPEG nearly


def test_image_gray_alpha_palette_and_16_bits(tmp_path: Path) -> None:
    gray = COLOR[..., 0]
    want = np.repeat(gray[..., None], 3, axis=2)
    assert (read_image(save(tmp_path / "gray.png", gray)) == want).all()
    wide = gray.astype(np.uint16) * 256 + 77
    assert (read_image(save(tmp_path / "gray16.png", wide)) == want).all()
    alpha = np.dstack([COLOR, gray])
    assert (read_image(save(tmp_path / "alpha.png", alpha)) == COLOR).all()
    cv2.imwrite(str(tmp_path / "color16.png"), COLOR[..., ::-1].astype(np.uint16) * 256 + 77)
    assert (read_image(tmp_path / "color16.png") == COLOR).all()
    palette = Image.fromarray(IDS)
    palette.putpalette(list(range(105)))
    palette.save(tmp_path / "palette.png")
    assert (read_image(tmp_path / "palette.png")[..., 1] == 3 * IDS + 1).all()


def test_exif_orientation_is_left_as_it_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    path = save(tmp_path / "a.jpg", COLOR, exif=exif)
    assert read_image(path).shape == COLOR.shape
    turned = read_image(path, upright=True)
    assert turned.shape == (COLOR.shape[1], COLOR.shape[0], 3)
    assert (turned == np.rot90(read_image(path), -1)).all()


def test_bits_and_floats_are_brought_to_eight_bits(tmp_path: Path) -> None:
    gray = np.array([[0, 1000, 4095]], np.uint16)
    Image.fromarray(gray).save(tmp_path / "gray12.png")
    assert read_image(tmp_path / "gray12.png")[0, :, 0].tolist() == [0, 62, 255]
    cv2.imwrite(str(tmp_path / "color12.png"), np.dstack([gray] * 3))
    assert read_image(tmp_path / "color12.png")[0, :, 1].tolist() == [0, 62, 255]
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "f.tif")
    assert read_image(tmp_path / "f.tif")[0, :, 2].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0.0, -3.0]], np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(UnreadableImage, match="float pixels from -3 to 0"):
        read_image(tmp_path / "depth.tif")


@pytest.mark.parametrize("mode", ["La", "RGBa", "LAB", "HSV", "YCbCr", "PA", "RGBX", "CMYK", "I"])
def test_rare_modes(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Image.fromarray(COLOR)
    if mode in ("La", "PA"):
        rare = plain.convert("LA").convert(mode)
    elif mode == "RGBa":
        rare = plain.convert("RGBA").convert(mode)
    elif mode == "LAB":
        rare = Image.new("LAB", plain.size, (120, 130, 140))
    else:
        rare = plain.convert("L").convert("I") if mode == "I" else plain.convert(mode)
    path = save(tmp_path / "a.png", COLOR)
    monkeypatch.setattr("mfuser.data.images._load", lambda _: rare)
    assert read_image(path).shape == COLOR.shape


def test_label_keeps_index_bits_and_channels(tmp_path: Path) -> None:
    palette = Image.fromarray(IDS)
    palette.putpalette([7] * 768)
    palette.save(tmp_path / "p.png")
    assert (read_label(tmp_path / "p.png") == IDS).all()
    assert (read_label(save(tmp_path / "l.png", IDS)) == IDS).all()
    wide = IDS.astype(np.uint16) * 1000
    assert (read_label(save(tmp_path / "w.png", wide)) == wide).all()
    assert (read_label(save(tmp_path / "c.png", COLOR)) == COLOR).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_label_of_16_bits_and_channels_is_rgb(tmp_path: Path, channels: int) -> None:
    wide = RNG.integers(0, 2**16, (7, 11, channels), dtype=np.uint16)
    bgr = wide[..., [2, 1, 0, 3][:channels]]
    assert cv2.imwrite(str(tmp_path / "a.png"), np.ascontiguousarray(bgr))
    label = read_label(tmp_path / "a.png")
    assert label.dtype == np.uint16 and (label == wide).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_of_few_bits_is_not_stretched(tmp_path: Path, bits: int) -> None:
    ids = IDS % 2**bits
    palette = Image.fromarray(ids)
    palette.putpalette([3, 2, 1] * 2**bits)
    palette.save(tmp_path / "p.png", bits=bits)
    assert (read_label(tmp_path / "p.png") == ids).all()
    # Pillow writes no gray PNG of few bits: turn the palette file into one, chunk by chunk.
    gray = as_gray((tmp_path / "p.png").read_bytes())
    (tmp_path / "g.png").write_bytes(gray)
    assert (read_label(tmp_path / "g.png") == ids).all()


def as_gray(png: bytes) -> bytes:
    import struct
    import zlib

    out, place = png[:8], 8
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            data = data[:9] + b"\x00" + data[10:]  # color type 0: gray
        if kind != b"PLTE":
            out += struct.pack(">I", len(data)) + kind + data
            out += struct.pack(">I", zlib.crc32(kind + data))
        place += length + 12
    return out


@pytest.mark.parametrize("read", [read_image, read_label])
def test_unreadable_files_are_named(tmp_path: Path, read) -> None:
    with pytest.raises(UnreadableImage, match=r"there is no file .*gone.png"):
        read(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match=r"cannot be read: Is a directory"):
        read(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"empty.png cannot be read: it is empty"):
        read(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no picture, but more than a header's worth of letters")
    with pytest.raises(UnreadableImage, match=r"text.png cannot be read: it is not an image"):
        read(tmp_path / "text.png")


@pytest.mark.parametrize("kind", ["jpg", "png", "png16"])
def test_files_cut_short_never_pass(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind[:3]}"
    big = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if kind == "png16":
        cv2.imwrite(str(path), big.astype(np.uint16) * 7)
    else:
        save(path, big)
    data = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        for read in (read_image, read_label):
            with pytest.raises(UnreadableImage, match=r"a\.\w+ cannot be read"):
                read(path)


def test_damaged_16_bit_png_never_passes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), RNG.integers(0, 2**16, (64, 64, 3), dtype=np.uint16))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match="'IDAT' chunk is damaged"):
        read_label(path)
