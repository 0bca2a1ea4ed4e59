"""The HTML report: opened, clicked, sorted and slid in a real browser, from disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfuser import Registry
from mfuser.config.run import RunSpec
from mfuser.engine.evaluate import evaluate
from mfuser.engine.train import train
from mfuser.reporting.page import page, save
from mfuser.reporting.report import Report

FIRST = "#table tbody tr:not(.total) td:nth-child(2)"
"""The cells of the first domain."""


@pytest.fixture(scope="module")
def report(tiny: Registry, trained: Path) -> Report:
    return evaluate(tiny, trained, limit=7)


@pytest.fixture(scope="module")
def watched(tiny: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a training that was measured twice."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    recipe = tiny.recipe("tiny", ["validate_every=2", "validate_images=2"])
    train(
        tiny,
        RunSpec.of(tiny, "plain", "tiny", pairing=tiny.pairing("plain"), recipe=recipe),
        folder,
    )
    return folder / "progress.html"


def test_it_holds_everything_and_fetches_nothing(report: Report, tmp_path: Path) -> None:
    save(report, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", text)
    read = json.loads((tmp_path / "report.json").read_text())
    for name, domain in report.domains.items():
        counts = np.array(read["domains"][name]["confusion"])
        hits, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
        for k, c in enumerate(report.classes):
            if union[k] and c in domain.scored:
                assert domain.iou[c] == pytest.approx(hits[k] / union[k])
        assert len(domain.per_image) == domain.images
        shown = report.pictures[name]
        assert [p.score.miou for p in shown] == sorted(p.score.miou for p in shown)
        assert shown[0].score.miou == min(s.miou for s in domain.per_image)
        assert shown[-1].score.miou == max(s.miou for s in domain.per_image)


def test_names_cannot_end_the_script(report: Report) -> None:
    evil = report.model_copy(update={"pairing": "</script><script>alert(1)</script>"})
    assert "</script><script>alert" not in page(evil)


def test_in_a_browser(report: Report, tmp_path: Path, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def all_of(css: str) -> list[Any]:
        return list(browser.find_elements("css selector", css))

    save(report, tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    assert report.pairing in all_of("h1")[0].text
    rows = [r.text for r in all_of("#table tbody tr:not(.total)")]
    assert len(rows) == len([n for n, _ in report.rows() if n in report.classes])

    all_of("#table th button")[1].click()  # sorted by the first domain, best first
    values = [
        float(c.text) for c in all_of("#table tbody tr:not(.total) td:nth-child(2)") if c.text
    ]
    assert values == sorted(values, reverse=True)
    all_of("#table th button")[1].send_keys(Keys.ENTER)  # by keyboard, the other way
    values = [
        float(c.text) for c in all_of("#table tbody tr:not(.total) td:nth-child(2)") if c.text
    ]
    assert values == sorted(values)

    name = list(report.domains)[1]
    Select(all_of("#shots-domain")[0]).select_by_value(name)
    shown = len(report.pictures[name])
    WebDriverWait(browser, 10).until(lambda _: len(all_of("#shots input")) == shown)
    count = "return [...document.querySelectorAll('#shots .stage canvas:nth-child(2)')].map(c => \
        { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; \
        for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; })"
    WebDriverWait(browser, 10).until(lambda _: min(browser.execute_script(count)) > 0)
    painted = browser.execute_script(count)
    for button in all_of("#legend button"):
        button.click()
    assert max(browser.execute_script(count)) == 0
    all_of("#legend button")[0].click()
    assert all_of("#legend button")[0].get_attribute("aria-pressed") == "true"
    for button in all_of("#legend button")[1:]:
        button.click()
    assert browser.execute_script(count) == painted
    Select(all_of("#shots-view")[0]).select_by_value("error")
    assert browser.execute_script(count) != painted

    slider = all_of("#shots input")[0]
    slider.send_keys(Keys.HOME)
    clip = browser.execute_script(
        "return document.querySelector('#shots .stage canvas:nth-child(2)').style.clipPath"
    )
    assert "100%" in clip

    Select(all_of("#matrix-view")[0]).select_by_value("column")
    Select(all_of("#images-domain")[0]).select_by_value(name)
    assert len(all_of("#list tbody tr")) == report.domains[name].images
    theme = "return document.documentElement.dataset.theme"
    before = browser.execute_script(theme)
    all_of("#theme")[0].click()
    assert browser.execute_script(theme) != before
    assert all_of("#diagrams svg")
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_a_training_in_a_browser(watched: Path, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    def all_of(css: str) -> list[Any]:
        return list(browser.find_elements("css selector", css))

    browser.get(watched.as_uri())
    assert all_of("#state")[0].text.startswith("Finished: step 4 of 4; mIoU ")
    titles = [h.text for h in all_of("#charts h3")]
    assert titles == ["Loss", "Validation on held-out images of toy", "Learning rate",
                      "Seconds per step"]  # fmt: skip
    assert len(all_of("#charts circle")) == 4  # two figures, two steps
    assert len(all_of("#examples img")) == 2 * 3
    width = "return [...document.querySelectorAll('#examples img')].map(i => i.naturalWidth)"
    assert browser.execute_script(width) == [96] * 6
    source = "return document.querySelector('#examples img:last-child').src"
    last = browser.execute_script(source)
    assert all_of("#at")[0].text == "4"
    all_of("#step")[0].send_keys(Keys.HOME)
    assert all_of("#at")[0].text == "2" and browser.execute_script(source) != last
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
