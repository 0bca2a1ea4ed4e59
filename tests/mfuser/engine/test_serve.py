"""The page of `mfuser serve`: what it computes, and the page itself in a real browser."""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mfuser import Registry
from mfuser.engine import app
from mfuser.engine.app import serving
from mfuser.engine.checkpoints import load_model
from mfuser.engine.predict import predict
from mfuser.engine.viewer import Viewer
from mfuser.errors import DataError, MFuserError, OutOfMemoryError
from mfuser.reporting import draw


@pytest.fixture(scope="module")
def viewer(tiny: Registry, trained: Path) -> Viewer:
    return Viewer(load_model(trained, tiny)[0], "plain <b>", torch.device("cpu"), longest=160)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored on its side, as cameras do."""
    path = tmp_path_factory.mktemp("photos") / "a garden.jpg"
    pixels = (np.indices((120, 100)).sum(0)[..., None] * (3, 5, 7) % 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def test_the_masks_of_predict(
    viewer: Viewer, photo: Path, tiny: Registry, trained: Path, tmp_path: Path
) -> None:
    """Turned as EXIF says, with the same classes in the same shares."""
    seen = viewer.look(photo)
    (entry,) = predict(tiny, trained, [photo], tmp_path, scores="png", scale="auto")
    mask = np.asarray(Image.open(entry["mask"]))
    assert seen.size == mask.shape == (100, 120)
    assert np.array_equal(seen.mask, draw.color(mask, viewer.table))
    assert np.array_equal(seen.overlay, np.asarray(Image.open(entry["overlay"])))
    assert {k: round(v, 4) for k, v in seen.shares.items()} == entry["classes"]
    assert list(seen.shares.values()) == sorted(seen.shares.values(), reverse=True)
    likely = np.asarray(Image.open(entry["confidence"])) / 255
    assert seen.certainty == pytest.approx(likely.mean(), abs=1 / 255)


def test_large_and_small_photographs(viewer: Viewer, tmp_path: Path) -> None:
    """Shrunk to the longest side; enlarged to the window; the size told is the file's."""
    for size, shown in (((640, 480), (160, 120)), ((20, 30), (20, 30))):
        file = tmp_path / f"{size[0]}.png"
        Image.new("RGB", size, "teal").save(file)
        seen = viewer.look(file)
        assert seen.mask.shape[:2] == shown[::-1] and seen.size == size[::-1]
        like = viewer.compare(file, "road")
        assert like.picture.shape[:2] == shown[::-1] and -1 <= like.least <= like.most <= 1


def test_memory_that_runs_out_is_explained(
    viewer: Viewer, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        torch.empty(2**58)  # the allocator's own error

    monkeypatch.setattr(viewer.model, "segment_by", full)
    with pytest.raises(OutOfMemoryError, match=r"a garden\.jpg: out of memory.*--longest-side"):
        viewer.look(photo)


def test_what_is_no_photograph(viewer: Viewer, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    with pytest.raises(DataError, match="not an image in a known format"):
        viewer.look(tmp_path / "notes.jpg")
    with pytest.raises(MFuserError, match="is a video: mfuser predict"):
        viewer.look(tmp_path / "clip.mp4")
    with pytest.raises(MFuserError, match="text encoder cannot take"):
        viewer.compare(photo, "word " * 200)


def test_the_command_refuses(
    trained: Path, monkeypatch: pytest.MonkeyPatch, mfuser: Callable[..., Any]
) -> None:
    """A port that is taken, a package that is missing: one sentence each."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = mfuser("serve", trained, "--port", taken.getsockname()[1])
    assert done.code == 2 and "give another --port, or 0" in done.err, done.err
    find = importlib.util.find_spec
    monkeypatch.setattr(app, "find_spec", lambda name: None if name == "gradio" else find(name))
    done = mfuser("serve", trained)
    assert done.code == 2 and 'pip install "mfuser[app]"' in done.err


def test_the_command_serves(
    trained: Path, monkeypatch: pytest.MonkeyPatch, mfuser: Callable[..., Any]
) -> None:
    """Until Ctrl-C, which is not a failure."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs the extra app")

    wait = threading.Event.wait

    def pressed(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return wait(event, timeout)  # progress bars of others wait, too

    monkeypatch.setattr("threading.Event.wait", pressed)
    monkeypatch.setattr(app, "serving", _announced)
    done = mfuser("serve", trained, "--port", "0")
    assert done.code == 0 and "http://127.0.0.1:1 (Ctrl-C ends it)" in done.out
    assert done.out.endswith("stopped\n")


class _announced:
    """In the place of `serving`: no page."""

    def __init__(self, viewer: Viewer, port: int) -> None:
        assert viewer.name == "plain" and port == 0

    def __enter__(self) -> str:
        return "http://127.0.0.1:1"

    def __exit__(self, *_: object) -> None:
        pass


def test_in_a_browser(viewer: Viewer, photo: Path, tmp_path: Path, browser: Any) -> None:
    pytest.importorskip("gradio", reason="needs the extra app")
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def text_of(css: str) -> str:
        return " ".join(e.text for e in browser.find_elements("css selector", css))

    def wait(ready: Callable[[], Any]) -> Any:
        return WebDriverWait(browser, 30, 0.1).until(lambda _: ready())

    def upload(path: Path) -> None:
        wait(lambda: browser.find_elements("css selector", "#photo input[type=file]"))
        browser.find_element("css selector", "#photo input[type=file]").send_keys(str(path))

    def size_of(css: str) -> list[int] | None:
        script = "const i = document.querySelector(arguments[0] + ' img'); \
            return i && i.complete && i.naturalWidth ? [i.naturalWidth, i.naturalHeight] : null"
        found: list[int] | None = browser.execute_script(script, css)
        return found

    before = {name: os.environ.get(name) for name in app.QUIET}
    with serving(viewer, 0) as address:
        browser.get(address)
        assert address.startswith("http://127.0.0.1:")
        upload(photo)
        wait(lambda: "120x100 pixels; mean confidence" in text_of("#said"))
        assert wait(lambda: size_of("#overlay")) == [120, 100]
        for part in ("#mask", "#confidence"):
            assert wait(lambda part=part: size_of(part)) == [120, 100]
        seen = viewer.look(photo)
        best, share = next(iter(seen.shares.items()))
        assert f"{best} {100 * share:.1f} %" in text_of("#legend li")
        assert len(browser.find_elements("css selector", "#legend li")) == len(seen.shares)
        assert "plain <b>" in text_of("h1")  # a name is not markup

        words = browser.find_element("css selector", "#words textarea, #words input")
        words.send_keys("traffic light" + Keys.ENTER)
        wait(lambda: "“traffic light”: cosine from" in text_of("#said"))
        assert wait(lambda: size_of("#likeness")) == [120, 100]
        if shot := os.environ.get("MFUSER_SCREENSHOT"):
            browser.save_screenshot(shot)

        bad = tmp_path / "bad & <i>ugly.png"
        bad.write_bytes(b"\x89PNG no more")
        browser.find_element("css selector", "#photo button[aria-label*=lear]").click()
        wait(lambda: "Drop a photograph above" in text_of("#said"))
        upload(bad)
        wait(lambda: browser.find_elements("css selector", "#said [role=alert]"))
        said = text_of("#said [role=alert]")
        assert "cannot be read" in said and str(tmp_path) not in said and "/" not in said[:20]
        assert not browser.find_elements("css selector", "#legend li")

        asked = browser.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
        )
        assert asked and all(u.startswith((address, "data:", "blob:")) for u in asked), asked
        severe = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
        assert severe == []
    assert {name: os.environ.get(name) for name in app.QUIET} == before
    with socket.socket() as probe:  # nobody is there any more
        assert probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0
