"""Validation while a model trains: on which images, at no cost to the weights, what is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from stopping import gone_in

from mfuser import MFuserError, Registry
from mfuser.config.run import Domain, RunSpec
from mfuser.engine import checkpoints
from mfuser.engine.checkpoints import BEST, FINAL, load_model
from mfuser.engine.evaluate import evaluate
from mfuser.engine.folder import LOG, PAGE
from mfuser.engine.live import STEPS, _spread
from mfuser.engine.train import train
from mfuser.engine.validate import keep_back
from mfuser.errors import DataError, NoSplitError
from mfuser.reporting import progress

PLAIN = ("steps=6", "save_every=2", "lr=1e-2", "seed=1")
"""Too fast a rate: step 2 is the best by far."""
VALIDATE = ("validate_every=2", "validate_images=4")
RECIPE = (*PLAIN, *VALIDATE)


def same(one: Path, other: Path, name: str = FINAL) -> bool:
    a, b = (checkpoints.read(folder / name).model for folder in (one, other))
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def measured(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]
    return [line for line in lines if "validation" in line]


@pytest.fixture(scope="module")
def validated(tiny: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, measured after every second one."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    recipe, pairing = tiny.recipe("tiny", RECIPE), tiny.pairing("plain")
    train(tiny, RunSpec.of(tiny, "plain", "tiny", pairing=pairing, recipe=recipe), folder)
    return folder


def test_the_weights_are_those_of_a_run_without(
    validated: Path, tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    train(tiny, begin("plain", *PLAIN), tmp_path / "r")
    assert same(validated, tmp_path / "r")
    assert not (tmp_path / "r" / BEST).exists() and not measured(tmp_path / "r")


def test_what_is_measured_is_what_an_evaluation_gives(
    validated: Path, tiny: Registry, mfuser: Any, write_registry: Any, tmp_path: Path
) -> None:
    found = measured(validated)
    assert [line["step"] for line in found] == [2, 4, 6]
    figures = [line["validation"]["miou"] for line in found]
    assert found[0]["validation"]["on"] == "held-out images of toy"
    best = checkpoints.read(validated / BEST)
    assert best.meta["weights"]["miou"] == max(figures)
    assert best.step == 2 * (1 + figures.index(max(figures)))
    flags = [line["validation"]["best"] for line in found]
    assert flags == [value > max([-1.0, *figures[:k]]) for k, value in enumerate(figures)]

    # Four of the six images of the source's own val split, evenly spaced; here all of them.
    run = RunSpec.read(tiny, best.meta["run"], "here")
    six = run.model_copy(update={"recipe": run.recipe.model_copy(update={"validate_images": 6})})
    train(tiny, six, tmp_path / "six")
    for weights, line in (("last", measured(tmp_path / "six")[-1]), ("best", None)):
        report = evaluate(
            tiny, tmp_path / "six", targets=[run.sources[0]], limit=6, weights=weights
        )
        if line is None:
            line = [entry for entry in measured(tmp_path / "six") if entry["validation"]["best"]][
                -1
            ]
            assert report.protocol["checkpoint"].startswith(
                f"step {line['step']}, the best on held-out images of toy (mIoU "
            )
            assert report.title == "plain, recipe tiny"
        assert report.domains["toy"].miou == pytest.approx(line["validation"]["miou"], abs=1e-9)


def test_killed_and_resumed_equals_never_stopped(
    validated: Path, tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    with gone_in(6):
        train(tiny, begin("plain", *RECIPE), folder)
    stopped = progress.read(folder / PAGE)
    assert stopped["facts"]["state"] == "stopped" and stopped["facts"]["step"] == 4
    train(tiny, begin("plain", *RECIPE), folder, resume=True)
    assert same(validated, folder) and same(validated, folder, BEST)
    assert measured(validated) == measured(folder)
    whole, parts = (progress.read(f / PAGE) for f in (validated, folder))
    assert whole["examples"] == parts["examples"] and whole["validation"] == parts["validation"]


def test_the_page_while_it_trains(validated: Path) -> None:
    page = progress.read(validated / PAGE)
    assert page["facts"]["state"] == "finished" and page["facts"]["step"] == 6
    assert [step for step, _ in page["curves"]["loss"]] == [1, 6]
    assert [entry["step"] for entry in page["validation"]] == [2, 4, 6]
    assert len(page["examples"]) == 3
    for example in page["examples"]:
        assert example["name"].startswith("game_val_0_")
        assert [step for step, _ in example["predictions"]] == [2, 4, 6]
    text = (validated / PAGE).read_text("utf-8")
    assert "/*" not in text.partition("<body>")[0] and not re.search(r"https?://(?!www.w3)", text)


def test_long_trainings_keep_the_page_small() -> None:
    lines = [{"step": step, "loss": float(step)} for step in range(1, 10001)]
    text = progress.page({"state": "running"}, lines, [], ("road",))
    data = json.loads(progress.DATA.search(text)[1])  # type: ignore[index]
    curve = data["curves"]["loss"]
    assert len(curve) == 400 and curve[-1] == [10000, 9988.0]  # the mean of the last 25
    shown: list[list[Any]] = []
    for step in range(500, 50001, 500):
        shown = _spread([*shown, [step, ""]])
    steps = [step for step, _ in shown]
    assert len(steps) == STEPS and (steps[0], steps[-1]) == (500, 50000)
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 3 * 50000 / STEPS


def test_a_changed_page_is_begun_anew(tmp_path: Path) -> None:
    script = '<script type="application/json" id="data">{}</script>'
    for content in ("", script.format("{"), script.format("[]"), script.format('{"examples":[1]}')):
        (tmp_path / PAGE).write_text(content)
        assert progress.read(tmp_path / PAGE) == {}
    assert progress.read(tmp_path / "none.html") == {}


def test_images_are_held_out_where_there_is_no_val_split(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mfuser_plugins.datasets.streets import StreetsSpec

    original = StreetsSpec.build

    def build(self: StreetsSpec, root: Any, split: str) -> Any:
        if split == "val" and self.count == 40:
            raise NoSplitError("streets: there is no val split")
        return original(self, root, split)

    monkeypatch.setattr(StreetsSpec, "build", build)
    size = (64, 96)
    for count, images, expected in ((40, 10, 4), (40, 3, 3), (2, 10, 1)):
        spec = tiny.dataset("toy").model_copy(update={"count": count, "split": "val"})
        run = begin("plain", "validate_every=2", f"validate_images={images}")
        if count == 40:  # one without a split, the other trained on its val split
            spec = spec.model_copy(update={"split": None})
        run = run.model_copy(
            update={"sources": (run.sources[0].model_copy(update={"spec": spec, "name": "other"}),)}
        )
        source = run.sources[0].build(tiny, "train")
        (left,), (kept,) = keep_back(tiny, run, [source], size)
        assert len(kept.dataset) == expected and not kept.target
        names = [{d.name(k) for k in range(len(d))} for d in (left, kept.dataset)]  # type: ignore[attr-defined]
        assert not names[0] & names[1] and len(names[0] | names[1]) == count
        assert left.fingerprint() != source.fingerprint()
        (again,), _ = keep_back(tiny, run.model_copy(update={"seed": 7}), [source], size)
        assert {again.name(k) for k in range(len(again))} == names[0]  # whatever the seed

    lone = run.sources[0].spec.model_copy(update={"count": 1})  # type: ignore[union-attr]
    run = run.model_copy(update={"sources": (run.sources[0].model_copy(update={"spec": lone}),)})
    with pytest.raises(DataError, match="'other' has one image and no val split, so that nothing"):
        keep_back(tiny, run, [run.sources[0].build(tiny, "train")], size)


def test_on_a_target_by_name_every_report_says_so(
    mfuser: Any, write_registry: Any, inside: Path
) -> None:
    registry = ("--registry", write_registry())
    chosen = ("validate_every=2", "validate_on=toy-night", "ema.decay=0.5", "precision=bf16")
    settings = [word for setting in chosen for word in ("--set-recipe", setting)]
    command = ("train", "plain", "--recipe", "tiny", *registry, "--out", "r", *settings)
    done = mfuser(*command, "--no-evaluate")
    assert done.code == 0, done.err
    assert re.search(r"step 4: mIoU \d+\.\d% on 6 images of toy-night", done.err)
    done = mfuser("evaluate", "r", "--weights", "best", "--limit", 1, *registry)
    assert done.code == 0, done.err
    words = "plain, recipe tiny, its weights chosen on target toy-night"
    assert (inside / "r/report.md").read_text().startswith(f"# {words}\n")
    assert json.dumps(words) in (inside / "r/report.html").read_text()
    assert ", the best on toy-night (mIoU " in done.out
    assert "of averaged weights" in done.out.replace("\n", " ")
    done = mfuser("evaluate", "r", "--weights", "last", "--limit", 1, *registry)
    assert "chosen on target" not in done.out and "validated on toy-night" in done.out


def test_a_recipe_may_ask_for_the_best(
    validated: Path, tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    done = train(tiny, begin("plain", *RECIPE, "weights=best"), folder)
    best = checkpoints.read(validated / BEST)
    assert done.step == best.step == 2 and done.weights == best.meta["weights"]
    for model in (done.model, load_model(folder, tiny)[0]):
        found = checkpoints.trained_state(model)
        assert all(torch.equal(found[k], best.model[k]) for k in best.model)
    assert load_model(folder, tiny, weights="last")[1].step == 6


def test_two_processes_share_the_images(
    write_registry: Any, tmp_path: Path, tiny: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, out = write_registry(), tmp_path / "r"
    settings = [w for s in (*VALIDATE, "ema.decay=0.5") for w in ("--set-recipe", s)]
    command = ["train", "plain", "--recipe", "tiny", "--registry", registry, "--no-evaluate"]
    ended = launch([*command, "--out", out, "--device", "cpu", *settings], tmp_path)
    assert [e.code for e in ended] == [0, 0], ended
    said = [e.err.count("held-out images of toy") for e in ended]
    assert said == [2, 0]
    found = measured(out)
    # One process measures the same: all take the first one's running statistics.
    _, best = load_model(out, tiny, weights="best")
    run = RunSpec.read(tiny, best.meta["run"], "here")
    _, (kept,) = keep_back(tiny, run, [run.sources[0].build(tiny, "train")], (64, 96))
    monkeypatch.setattr(Domain, "build", lambda *_: kept.dataset)
    report = evaluate(tiny, out, targets=[run.sources[0]], limit=4, weights="best")
    assert report.domains["toy"].miou == pytest.approx(best.meta["weights"]["miou"], abs=1e-9)
    assert found[-1]["validation"]["images"] == 4
    assert "of averaged weights" in report.protocol["checkpoint"]


def test_an_image_that_cannot_be_measured_costs_no_step(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mfuser.data.images import UnreadableImage
    from mfuser_plugins.datasets.streets import Streets

    original = Streets.__getitem__

    def item(self: Streets, index: int) -> Any:
        if self.split == "val":
            raise UnreadableImage("x.png cannot be read")
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Streets, "__getitem__", item)
        with pytest.raises(MFuserError, match=r"x\.png cannot be read \(2 steps are saved; fix"):
            train(tiny, begin("plain", *VALIDATE), tmp_path / "r")
    train(tiny, begin("plain", *VALIDATE), tmp_path / "r", resume=True)
    assert measured(tmp_path / "r")[-1]["step"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("validate_every=5",), "validate_every = 5 is more than steps = 4; lower it"),
        (("validate_every=0",), "validate_every = 0"),
        (("validate_on=toy",), "validate_on = 'toy' does nothing without validate_every"),
        (("tracker=tensorbord",), "tracker"),
        (("weights=best",), "weights = 'best' needs validate_every"),
        (("weights=averaged",), "weights = 'averaged' needs ema"),
    ],
)
def test_what_a_recipe_refuses(tiny: Registry, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(MFuserError, match=message):
        tiny.recipe("tiny", settings)


def test_what_a_run_refuses_before_its_folder_is_made(
    begin: Any, write_registry: Any, tmp_path: Path
) -> None:
    from mfuser import load_registry

    small = "[dataset.small]\nname = 'streets'\nsize = [32, 48]\ncount = 4\n"
    registry = load_registry(write_registry(small))
    for name, message in (
        ("toy-nihgt", "validate_on: .*toy-nihgt.*did you mean 'toy-night'"),
        ("acdc", "validate_on: acdc stands for 4 domains .*; name one"),
        ("small", "validate_every: small: .*32x48 pixels is smaller than the window of 64x96"),
    ):
        with pytest.raises(MFuserError, match=message):
            train(
                registry, begin("plain", "validate_every=2", f"validate_on={name}"), tmp_path / "r"
            )
        assert not (tmp_path / "r").exists()
