"""Scores against values counted by hand and pixel by pixel; reports in all their forms."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mfuser import Registry
from mfuser.config.run import Domain, RunSpec, domains
from mfuser.engine.checkpoints import load_model
from mfuser.engine.decision import decide, predict_ids
from mfuser.engine.evaluate import evaluate
from mfuser.engine.gallery import picture
from mfuser.engine.measure import test_scale
from mfuser.engine.metrics import Calibration, Confusion, scores
from mfuser.engine.train import train
from mfuser.errors import DataError, MFuserError

test_scale.__test__ = False  # type: ignore[attr-defined]

ids = st.integers(0, 3)
labels = st.lists(st.sampled_from([0, 1, 2, 3, 255]), min_size=1, max_size=40)


@given(labels, st.data())
def test_confusion_and_iou_against_pixel_by_pixel(truth: list[int], data: Any) -> None:
    guess = data.draw(st.lists(ids, min_size=len(truth), max_size=len(truth)))
    confusion = Confusion(4)
    half = len(truth) // 2  # added in two parts
    for part in (slice(0, half), slice(half, None)):
        confusion.add(np.array(truth[part], np.int64), np.array(guess[part], np.int64))
    pairs = [(t, g) for t, g in zip(truth, guess, strict=True) if t != 255]
    for t in range(4):
        for g in range(4):
            assert confusion.counts[t, g] == pairs.count((t, g))
    found = scores(confusion.counts, (0, 1, 2, 3))
    ious = []
    for k in range(4):
        both = sum(t == k and g == k for t, g in pairs)
        either = sum(t == k or g == k for t, g in pairs)
        if either:
            ious.append(both / either)
            assert found.iou[k] == pytest.approx(both / either)
        else:
            assert math.isnan(found.iou[k])
    if pairs:
        assert found.miou == pytest.approx(sum(ious) / len(ious))
        assert found.accuracy == pytest.approx(sum(t == g for t, g in pairs) / len(pairs))
    else:
        assert math.isnan(found.miou) and math.isnan(found.accuracy)


def test_iou_by_hand() -> None:
    #        predicted 0  1  2
    counts = np.array([[4, 1, 0], [2, 3, 0], [0, 0, 0]])
    found = scores(counts, (0, 1, 2))
    assert found.iou[:2].tolist() == [4 / 7, 3 / 6] and math.isnan(found.iou[2])
    assert found.miou == pytest.approx((4 / 7 + 3 / 6) / 2)
    assert found.accuracy == 0.7
    # A class that is not asked for counts neither way; one that is only predicted counts as 0.
    assert scores(counts, (0,)).miou == 4 / 7
    assert scores(np.array([[3, 1], [0, 0]]), (0, 1)).iou.tolist() == [0.75, 0.0]


def test_predictions_are_the_best_of_the_scored_classes() -> None:
    score = torch.tensor([[[9.0, 0.0]], [[1.0, 2.0]], [[3.0, 1.0]]])
    assert predict_ids(score, (1, 2)).tolist() == [[0, 1]]
    assert predict_ids(score, (1, 2), (1, 2)).tolist() == [[2, 1]]
    assert predict_ids(score, (2, 4)).shape == (2, 4)


def test_images_are_fitted_into_the_test_size() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    assert test_scale(image, None) is image
    assert test_scale(image, (100, 50)).shape == (50, 100, 3)
    assert test_scale(image, (300, 50)).shape == (50, 100, 3)
    assert test_scale(image, (200, 100)) is image


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def named(registry: Registry, *names: str) -> list[Domain]:
    return [d for name in names for d in domains(registry, name)]


def test_a_report_against_the_model_itself(tiny: Registry, run: Path) -> None:
    report = evaluate(tiny, run, baselines=True, pictures=run / "pictures")
    assert list(report.domains) == ["toy", "toy-night"]
    model, checkpoint = load_model(run, tiny)
    for name, domain in report.domains.items():
        dataset = tiny.dataset(name).build(None, "val")
        counts = np.zeros((19, 19), np.int64)
        for i in range(2):
            sample = dataset[i]
            image = torch.from_numpy(sample.image).permute(2, 0, 1)
            guess = model.segment(image)[0].argmax(0).numpy()
            for t, g in zip(sample.label.ravel(), guess.ravel(), strict=True):
                if t != 255:
                    counts[t, g] += 1
        expected = scores(counts, tuple(range(19)))
        assert domain.images == 2 and len(domain.scored) == 19
        # Images in one pass or alone: float32 sums in another order may turn a pixel over.
        assert domain.miou == pytest.approx(expected.miou, abs=2e-3)
        assert domain.accuracy == pytest.approx(expected.accuracy, abs=2e-3)
        for k, label in enumerate(model.classes):
            assert (label in domain.iou) == math.isfinite(expected.iou[k])
        constant = model.classes.index(checkpoint.meta["run"]["most_frequent"])
        share = counts.sum(1)
        present = int((share > 0).sum()) + (share[constant] == 0)
        assert domain.most_frequent == pytest.approx(
            share[constant] / share.sum() / present, rel=1e-6
        )
        assert 0 <= report.untrained[name] < 1
    assert report.domains["toy"].seen and not report.domains["toy-night"].seen
    assert report.average == report.domains["toy-night"].miou
    assert report.gap == pytest.approx(report.domains["toy"].miou - report.average)
    assert report.protocol["steps"] == 4 and report.protocol["seed"] == 0
    assert report.protocol["limited to the first images"] == 2
    for name in report.domains:
        with Image.open(run / "pictures" / picture(name)) as panel:
            assert panel.width > 4 * 300


def test_the_same_domain_under_another_name_is_seen(tiny: Registry, run: Path) -> None:
    alias = Domain(name="alias", spec=tiny.dataset("toy"))
    report = evaluate(tiny, run, targets=[alias, *named(tiny, "toy-night")], limit=1)
    assert report.domains["alias"].seen and not report.domains["toy-night"].seen
    assert report.domains["alias"].images == 1


def test_reports_hold_the_same_figures(tiny: Registry, run: Path, tmp_path: Path) -> None:
    report = evaluate(tiny, run, baselines=True)
    report.save(tmp_path / "out", ["pictures/toy.png"])
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert data["domains"]["toy"]["miou"] == report.domains["toy"].miou
    rows = list(csv.reader(io.StringIO((tmp_path / "out/report.csv").read_text())))
    assert rows[0] == ["class", "toy (source)", "toy-night", "unseen average"]
    table = {row[0]: row[1:] for row in rows[1:]}
    assert float(table["mIoU"][0]) == pytest.approx(100 * report.domains["toy"].miou, abs=1e-3)
    assert table["mIoU"][1] == table["mIoU"][2]
    assert {"most frequent class", "untrained model"} <= set(table)
    for label in report.classes:
        values = [d.iou.get(label) for d in report.domains.values()]
        assert (label in table) == any(v is not None for v in values)
        for value, cell in zip(values, table.get(label, []), strict=False):
            assert cell == ("" if value is None else f"{100 * value:.4f}")
    markdown = (tmp_path / "out/report.md").read_text()
    assert f"**{100 * report.domains['toy'].miou:.1f}**" in markdown
    assert (
        "source toy; 4 steps of 1; seed 0; window 64x96; inference sliding (stride 43x64, "
        in markdown
    )
    assert "![pictures/toy.png](pictures/toy.png)" in markdown
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1


def test_two_evaluations_agree(tiny: Registry, run: Path) -> None:
    one, two = (evaluate(tiny, run, limit=1).as_json() for _ in range(2))
    assert one == two


def trained_a_step(
    registry: Registry, folder: Path, name: str, setting: str, recipe: Sequence[str] = ()
) -> None:
    """A run of one step, of a tiny pairing with one setting changed."""
    run = RunSpec.of(
        registry,
        name,
        "tiny",
        pairing=registry.pairing(name, [setting]),
        recipe=registry.recipe("tiny", ["steps=1", "warmup=0", *recipe]),
    )
    train(registry, run, folder)


def test_a_pairing_from_scratch_says_so(tiny: Registry, tmp_path: Path) -> None:
    trained_a_step(tiny, tmp_path / "r", "lone", "vfm.freeze=false")
    report = evaluate(tiny, tmp_path / "r", limit=1)
    assert any("vfm started from random weights" in note for note in report.notes)
    assert "nothing here is pretrained" in report.markdown()


def test_fewer_classes_are_scored_over_what_there_is(tiny: Registry, tmp_path: Path) -> None:
    trained_a_step(tiny, tmp_path / "r", "plain", 'classes=["sky", "road", "unicorn"]')
    report = evaluate(tiny, tmp_path / "r", limit=2)
    assert report.classes == ["sky", "road", "unicorn"]
    for domain in report.domains.values():
        assert domain.scored == ["sky", "road"] and set(domain.iou) <= {"sky", "road"}
    assert any("neither scored nor predicted: unicorn." in note for note in report.notes)
    assert "classes scored: those that each target labels (2 of 3);" in report.markdown()


def test_all_classes_are_scored_as_released(tiny: Registry, tmp_path: Path) -> None:
    """A class that a target never shows counts as 0 where it is predicted, else not at all."""
    classes = 'classes=["sky", "unicorn", "road", "dragon"]'
    trained_a_step(tiny, tmp_path / "r", "plain", classes, recipe=["scored=all"])
    report = evaluate(tiny, tmp_path / "r", targets=named(tiny, "toy-night"), limit=2)
    (domain,) = report.domains.values()
    assert domain.scored == ["sky", "unicorn", "road", "dragon"]
    assert domain.unlabeled == ["unicorn", "dragon"]
    imagined = {"unicorn", "dragon"} & set(domain.iou)
    assert imagined, "the untrained model predicts one of the classes that are not there"
    assert all(domain.iou[name] == 0 for name in imagined)
    assert domain.miou == pytest.approx(np.mean(list(domain.iou.values())))
    assert "classes scored: all of the pairing's (4 of 4);" in report.markdown()
    assert "toy-night: scored but never labeled: unicorn, dragon." in report.markdown()


def test_what_cannot_be_evaluated(
    tiny: Registry, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MFuserError, match="there is no target to evaluate on: give --targets"):
        evaluate(tiny, run, targets=[])
    small = Domain(name="small", spec={"name": "streets", "size": [32, 48], "count": 1})
    with pytest.raises(MFuserError, match=r"small, game_val_0_00000: an image of 32x48 .* smaller"):
        evaluate(tiny, run, targets=[small])
    with pytest.raises(MFuserError, match="a stride of 99x99 leaves gaps"):
        big = Domain(name="big", spec={"name": "streets", "size": [80, 120], "count": 1})
        evaluate(tiny, run, targets=[big], stride=(99, 99))
    from mfuser_plugins.datasets.streets import Streets

    original = Streets.__getitem__

    def cut(self: Any, index: int) -> Any:
        sample = original(self, index)
        return type(sample)(sample.image, sample.label[:-2], sample.name)

    monkeypatch.setattr(Streets, "__getitem__", cut)
    with pytest.raises(DataError, match="game_val_0_00000: the label is 96x62, the image 96x64"):
        evaluate(tiny, run)


def test_names_of_pictures_are_safe() -> None:
    assert picture("acdc:fog") == "acdc-fog.png"
    assert picture("a/../b c") == "a-..-b-c.png"


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60))
def test_calibration_against_bin_by_bin(pixels: list[tuple[float, bool]]) -> None:
    confidence = np.array([c for c, _ in pixels], np.float32)
    truth = np.array([0 if hit else 1 for _, hit in pixels])
    truth[0] = 255
    found = Calibration()
    for part in (slice(0, 20), slice(20, None)):
        found.add(truth[part], np.zeros_like(truth[part]), confidence[part])
    kept = pixels[1:]
    error = 0.0
    for k in range(15):
        low, high = k / 15, (k + 1) / 15
        mine = [p for p in kept if low < float(p[0]) <= high or (k == 0 and p[0] == 0)]
        if mine:
            error += abs(sum(hit for _, hit in mine) - sum(float(c) for c, _ in mine)) / len(kept)
    if kept:
        assert found.error == pytest.approx(error, abs=1e-6)
    else:
        assert math.isnan(found.error)


def test_metrics_agree_with_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.classification", reason="needs torchmetrics")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 40, 60, generator=generator)
    truth = torch.randint(0, 5, (4, 40, 60), generator=generator)
    truth[:, :3] = 255
    confusion, calibration = Confusion(5), Calibration()
    for scores_of, label in zip(logits, truth.numpy(), strict=True):
        prediction, confidence = decide(scores_of, label.shape)
        confusion.add(label, prediction)
        calibration.add(label, prediction, confidence)
    found = scores(confusion.counts, tuple(range(5)))
    jaccard = classification.MulticlassJaccardIndex(5, average=None, ignore_index=255)
    torch.testing.assert_close(
        torch.from_numpy(found.iou).float(), jaccard(logits.argmax(1), truth), rtol=1e-6, atol=0
    )
    ece = classification.MulticlassCalibrationError(5, n_bins=15, norm="l1", ignore_index=255)
    assert calibration.error == pytest.approx(float(ece(logits, truth)), rel=1e-4)
