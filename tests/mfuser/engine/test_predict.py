"""Masks of photographs: what is in them, under which names, from images of every kind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from odd import odd_files, photo
from PIL import Image

from mfuser import Registry, build_model
from mfuser.config.classes import CITYSCAPES
from mfuser.engine.checkpoints import load_model
from mfuser.engine.inputs import file_names, find
from mfuser.engine.photographs import scaled
from mfuser.engine.predict import _too_large, predict
from mfuser.engine.video import VideoReader, VideoWriter
from mfuser.errors import DataError, MFuserError
from mfuser.files import utf8_name
from mfuser.model.assembly import with_classes
from mfuser.reporting import draw


def test_masks_are_the_models_classes(tiny: Registry, trained: Path, tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    written = predict(tiny, trained, [path], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.mask.png",
        "a.overlay.png",
        "legend.png",
    ]
    model, _ = load_model(trained, tiny)
    ids = [f"{k} {name}" for k, name in enumerate(model.classes)]
    with Image.open(tmp_path / "out" / "legend.png") as legend:
        assert legend.tobytes() == draw.legend(ids, draw.palette(model.classes), 640).tobytes()
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
    assert [w["image"] for w in written if "mask" in w] == [str(good)]
    assert written[1]["image"] == str(bad) and "cannot be read" in written[1]["skipped"]
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
    ours = ["legend.png", "a.mask.png", "a.overlay.png", "a.confidence.png", "a.scores.npz"]
    names = ["b.PNG", "a.jpg", "c.txt", "d.gif", ".hidden.png", "film.MP4", "noending"]
    for name in [*ours, *names]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    (tmp_path / "deep" / "e.tif").write_bytes(b"")
    (tmp_path / "deep" / ".git" / "f.png").write_bytes(b"")
    found = find([tmp_path])
    assert [p.name for p in found.images] == ["a.jpg", "b.PNG", "d.gif"]
    assert [p.name for p in found.videos] == ["film.MP4"]
    assert [p.name for p in found.unknown] == ["c.txt", "noending"]
    assert [p.name for p in find([tmp_path], recursive=True).images][-1] == "e.tif"
    assert find([tmp_path / "c.txt"]).images == [tmp_path / "c.txt"]  # as given
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images; --recursive"):
        find([tmp_path / "empty"])
    with pytest.raises(DataError, match="there is no image or folder"):
        find([tmp_path / "none.png"])


def test_masks_lie_as_viewers_show_the_photograph(
    tiny: Registry, trained: Path, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    with Image.open(photo(tmp_path / "flat.png", (120, 100))) as image:
        image.save(tmp_path / "turned.png", exif=exif)
        image.rotate(-90, expand=True).save(tmp_path / "plain.png")
    predict(tiny, trained, [tmp_path / "turned.png", tmp_path / "plain.png"], tmp_path / "out")
    masks = [np.array(Image.open(tmp_path / f"out/{n}.mask.png")) for n in ("turned", "plain")]
    assert masks[0].shape == (120, 100) and (masks[0] == masks[1]).all()


def test_small_images_are_enlarged_on_request(
    tiny: Registry, trained: Path, tmp_path: Path
) -> None:
    paths = [photo(tmp_path / "s.png", (61, 7)), photo(tmp_path / "large.png")]
    predict(tiny, trained, paths, tmp_path / "out", scale="auto")
    with Image.open(tmp_path / "out/s.mask.png") as mask:
        assert mask.size == (61, 7)
    predict(tiny, trained, paths[1:], tmp_path / "plain")
    same = [np.array(Image.open(tmp_path / f"{f}/large.mask.png")) for f in ("out", "plain")]
    assert (same[0] == same[1]).all()
    assert [scaled(s, "fit", (64, 96)) for s in ((7, 61), (80, 120), (640, 480))] == [
        (64, 558), (64, 96), (128, 96),
    ]  # fmt: skip


def test_scores_and_chosen_classes(tiny: Registry, trained: Path, tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    (entry,) = predict(tiny, trained, [path], tmp_path / "out", scores="npz")
    with np.load(entry["scores"]) as file:
        shares, names = file["scores"], file["classes"].tolist()
    assert shares.dtype == np.float16 and shares.shape == (len(names), 80, 120)
    assert shares.astype(np.float32).sum(0) == pytest.approx(1, abs=1e-2)
    mask = np.array(Image.open(entry["mask"]))
    best = np.take_along_axis(shares, mask[None].astype(int), 0)[0]
    assert (best >= shares.max(0) - 1e-3).all()
    (entry,) = predict(
        tiny, trained, [path], tmp_path / "few", scores="png", classes=["sky", "road"]
    )
    confidence = np.array(Image.open(entry["confidence"]))
    assert confidence.dtype == np.uint8 and confidence.min() >= 127  # the better one of two
    ids = {CITYSCAPES.names.index(c) for c in ("sky", "road")}
    assert set(np.unique(np.array(Image.open(entry["mask"])))) <= ids
    with pytest.raises(MFuserError, match=r"'roads' \(did you mean 'road'\?\)\. Its decoder"):
        predict(tiny, trained, [path], tmp_path / "x", classes=["roads"])


def test_files_for_the_bravo_challenge(tiny: Registry, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked" / "bravo_ACDC" / "fog" / "test"
    folder.mkdir(parents=True)
    path = photo(folder / "a_rgb_anon.png")
    for scores in ("bravo", "npz"):
        (entry,) = predict(tiny, trained, [path], tmp_path / "out", scores=scores)
    place = tmp_path / "out" / "bravo_ACDC" / "fog" / "test"
    assert sorted(p.name for p in place.iterdir()) == ["a_rgb_anon_conf.png", "a_rgb_anon_pred.png"]
    ids, conf = (np.array(Image.open(place / f"a_rgb_anon_{n}.png")) for n in ("pred", "conf"))
    assert ids.dtype == np.uint8 and (ids == np.array(Image.open(entry["mask"]))).all()
    assert conf.dtype == np.uint16 and conf.shape == (80, 120)
    with np.load(entry["scores"]) as file:
        best = file["scores"].astype(np.float64).max(0)
    assert conf / 65536 == pytest.approx(best, abs=1e-3)
    with pytest.raises(MFuserError, match="lies in no folder bravo_"):
        predict(tiny, trained, [photo(tmp_path / "b.png")], tmp_path / "other", scores="bravo")
    assert not (tmp_path / "other").exists()


def test_new_names_where_the_decoder_reads_any_text(tiny: Registry) -> None:
    model = build_model(tiny.pairing("tiny", ["decoder=text_similarity", "enhancer=none"]))
    images = torch.rand(1, 3, *model.spec.image_size)
    before = model.segment(images)
    renamed = with_classes(model, ("sky", "zebra"))
    scores = renamed.segment(images)
    assert scores.shape[1] == 2 and renamed.classes == ("sky", "zebra")
    sky = CITYSCAPES.names.index("sky")
    assert torch.allclose(scores[:, 0], before[:, sky], atol=1e-5)


def test_videos(tiny: Registry, trained: Path, tmp_path: Path) -> None:
    film, out = (tmp_path / os.fsdecode(name) for name in (b"f\xeflm.mp4", b"\xfcout"))  # no UTF-8
    writer = VideoWriter(film, 5, (80, 120), ids=False)
    for k in range(3):
        writer.write(np.array(Image.open(photo(tmp_path / f"{'x' * (k + 1)}.png"))))
    writer.close()
    (entry,) = predict(tiny, trained, [film], out)
    assert entry["frames"] == 3 and VideoReader(Path(entry["overlay"])).size == (80, 120)
    with utf8_name(Path(entry["mask"])) as name:
        capture = cv2.VideoCapture(str(name))
    capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
    first = np.squeeze(capture.read()[1])
    model, _ = load_model(trained, tiny)
    frame = next(iter(VideoReader(film)))
    expected = model.segment(torch.from_numpy(frame).permute(2, 0, 1))[0].argmax(0).numpy()
    assert (first == expected).all()
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    with pytest.raises(DataError, match=r"broken\.mp4 is not a video"):
        predict(tiny, trained, [tmp_path / "broken.mp4"], tmp_path / "out")


def test_a_folder_of_odd_files(mfuser: Any, trained: Path, tmp_path: Path) -> None:
    odd = odd_files(tmp_path / "odd")
    result = mfuser(
        "predict", trained, tmp_path / "odd", "--skip-bad", "--json", "--out", tmp_path / "out"
    )
    assert result.code == 0 and "Traceback" not in result.err
    entries = json.loads(result.out)
    names = [Path(e["image"]).name for e in entries]
    assert sorted(names) == sorted([*odd.usable, *odd.small, *odd.broken])
    assert {Path(e["image"]).name for e in entries if "mask" in e} == set(odd.usable)
    for name in odd.passed:
        assert result.err.count(name) == 1
    assert not any(name in result.err for name in odd.hidden)
    again = mfuser("predict", trained, tmp_path / "odd", "--out", tmp_path / "none")
    assert again.code == 2 and not (tmp_path / "none").exists()
    assert "Traceback" not in again.err and sum(n in again.err for n in odd.broken) == 1


@pytest.mark.real
def test_real_photographs(tiny: Registry, trained: Path, tmp_path: Path, real: Any) -> None:
    paths = sorted((real / "camvid" / "images").iterdir())[:2]
    written = predict(tiny, trained, paths, tmp_path / "out", scale=0.5)
    for path, entry in zip(paths, written, strict=True):
        with Image.open(path) as image, Image.open(entry["mask"]) as mask:
            assert image.size == mask.size


def test_photographs_larger_than_what_was_tested() -> None:
    """Most of them: then a factor that makes them as large is named."""
    tested = {"targets": [{"spec": {}}, {"spec": {"test_size": [576, 384]}}]}
    assert "2 of 3 images are larger" in str(_too_large(tested, [(1600, 2400)] * 2 + [(384, 576)]))
    assert "--scale 0.24 shows" in str(_too_large(tested, [(1600, 2400), (2400, 1600)]))
    assert _too_large(tested, [(1600, 2400)] + [(384, 576)] * 2) is None
    for record in ({}, None, {"targets": [{"spec": None}, {"spec": {"test_size": None}}]}):
        assert _too_large(record, [(1600, 2400)]) is None
