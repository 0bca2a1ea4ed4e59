"""Masks of photographs: what is in them, under which names, from images of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mfuser import Registry
from mfuser.config.classes import CITYSCAPES
from mfuser.engine.checkpoints import load_model
from mfuser.engine.predict import file_names, find_images, predict
from mfuser.errors import DataError, MFuserError


def photo(path: Path, size: tuple[int, int] = (120, 80), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
    image.save(path)
    return path


def test_masks_are_the_models_classes(tiny: Registry, trained: Path, tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    written = predict(tiny, trained, [path], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.mask.png",
        "a.overlay.png",
        "legend.png",
    ]
    model, _ = load_model(trained, tiny)
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    expected = model.segment(pixels)[0].argmax(0).numpy()
    with Image.open(written[0]["mask"]) as mask:
        assert mask.mode == "P" and mask.size == (120, 80)
        assert (np.array(mask) == expected).all()
        first = int(expected[0, 0])
        assert np.array(mask.convert("RGB"))[0, 0].tolist() == list(CITYSCAPES.colors[first])
    with Image.open(written[0]["overlay"]) as overlay:
        assert overlay.mode == "RGB" and overlay.size == (120, 80)
    shares = written[0]["classes"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-2)
    for name, share in shares.items():
        wanted = (expected == CITYSCAPES.names.index(name)).mean()
        assert share == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA", "I;16"])
def test_images_of_every_mode(tiny: Registry, trained: Path, tmp_path: Path, mode: str) -> None:
    suffix = ".tif" if mode in ("CMYK", "I;16") else ".png"
    path = photo(tmp_path / f"a{suffix}", mode=mode)
    predict(tiny, trained, [path], tmp_path / "out")
    with Image.open(tmp_path / "out/a.mask.png") as mask:
        assert mask.size == (120, 80)


def test_scale_changes_what_is_seen_not_the_masks_size(
    tiny: Registry, trained: Path, tmp_path: Path
) -> None:
    path = photo(tmp_path / "small.png", (60, 40))
    with pytest.raises(MFuserError, match=r"small\.png: .*smaller than the window"):
        predict(tiny, trained, [path], tmp_path / "out")
    predict(tiny, trained, [path], tmp_path / "out", scale=2.0)
    with Image.open(tmp_path / "out/small.mask.png") as mask:
        assert mask.size == (60, 40)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MFuserError, match="scale is a factor above 0"):
            predict(tiny, trained, [path], tmp_path / "out", scale=scale)


def test_unreadable_images_stop_or_are_skipped(
    tiny: Registry, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = photo(tmp_path / "a.jpg"), photo(tmp_path / "b.jpg")
    bad.write_bytes(bad.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"b\.jpg cannot be read"):
        predict(tiny, trained, [good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written = predict(tiny, trained, [good, bad], tmp_path / "out", skip_unreadable=True)
    assert [w["image"] for w in written] == [str(good)]
    assert "skipped: " in capsys.readouterr().err


def test_no_mask_overwrites_another(tiny: Registry, trained: Path, tmp_path: Path) -> None:
    paths = [photo(tmp_path / p) for p in ("x/i/a.png", "y/i/a.png", "y/i/a.jpg", "b.png")]
    written = predict(tiny, trained, [*paths, paths[0]], tmp_path / "out")
    assert len(written) == 4 and len({w["mask"] for w in written}) == 4
    assert all(Path(w["mask"]).is_file() for w in written)


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "a_b"]), min_size=1, max_size=3).map(
            lambda parts: Path(*parts).with_suffix(".png")
        ),
        unique=True,
        max_size=6,
    )
)
def test_names_are_unique(paths: list[Path]) -> None:
    names = file_names(paths)
    assert len(set(names)) == len(paths)
    assert not any("/" in n for n in names)


def test_images_are_found(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in find_images([tmp_path])] == ["a.jpg", "b.PNG"]
    assert find_images([tmp_path / "c.txt"]) == [tmp_path / "c.txt"]  # as given
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        find_images([tmp_path / "empty"])
    with pytest.raises(DataError, match="there is no image or folder"):
        find_images([tmp_path / "none.png"])


@pytest.mark.real
def test_real_photographs(tiny: Registry, trained: Path, tmp_path: Path, real: Any) -> None:
    paths = sorted((real / "camvid" / "images").iterdir())[:2]
    written = predict(tiny, trained, paths, tmp_path / "out", scale=0.5)
    for path, entry in zip(paths, written, strict=True):
        with Image.open(path) as image, Image.open(entry["mask"]) as mask:
            assert image.size == mask.size
