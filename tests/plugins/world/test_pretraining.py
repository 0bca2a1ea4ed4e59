"""Pretraining: seeded, resumable at any moment, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mfuser.errors import CheckpointError, MFuserError, WeightsError
from mfuser_streets import towers
from mfuser_streets.pretrain import batches, run, tokenizer
from mfuser_streets.pretrain.recipe import RECIPES, Recipe, recipe
from mfuser_streets.world import captions

SMALL = {"pairs": 4, "captions": 8, "warmup": 2}


def small(tower: str = "vfm", steps: int = 4, **changes: object) -> Recipe:
    more = {"warm_start": 2} if tower == "vlm" else {}
    return recipe(tower, steps=steps, decay=1, **{**SMALL, **more, **changes})  # type: ignore[arg-type]


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of two steps; it is not to be written into."""
    folder = tmp_path_factory.mktemp("pretrained")
    run.pretrain(small(steps=2), folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.mark.parametrize("tower", ["vfm", "vlm"])
def test_a_run_that_was_stopped_comes_to_the_same_weights(
    tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run.pretrain(small(tower), tmp_path / "whole", save_every=1)
    step = run.Pretraining.step

    def stopped(self: run.Pretraining, number: int) -> dict[str, torch.Tensor]:
        if number == 3:
            raise Stop
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(run.Pretraining, "step", stopped)
        with pytest.raises(Stop):
            run.pretrain(small(tower), tmp_path / "cut", save_every=2)
    assert not list((tmp_path / "cut").glob("*.safetensors"))
    resumed = run.pretrain(small(tower), tmp_path / "cut", save_every=2)
    assert run.digest(resumed) == run.digest(whole)


def test_a_longer_run_begins_as_a_shorter_one(tmp_path: Path) -> None:
    """So that a run may be lengthened before its learning rate falls."""
    long = run.pretrain(small(steps=6), tmp_path / "straight")
    first = run.Pretraining(small(steps=4))
    for step in range(3):
        first.step(step)
    run._save(first, 3, _folder(tmp_path / "grown") / run.CHECKPOINT)
    grown = run.pretrain(small(steps=6), tmp_path / "grown")
    assert run.digest(grown) == run.digest(long)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 9}, "begun with seed = 5, and now seed = 9"),
        ({"contrast": 0.0}, "contrast = 1.0, and now contrast = 0.0"),
        ({"steps": 9}, "its learning rate has begun to fall"),
    ],
)
def test_another_recipe_is_refused(copied: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        run.pretrain(small(**{"steps": 2, **changes}), copied)


def test_another_world_and_a_broken_checkpoint_are_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "WORLD_VERSION", 99)
        with pytest.raises(CheckpointError, match=r"version 1 of the world, and this is 99"):
            run.pretrain(small(steps=2), copied)
    file = copied / run.CHECKPOINT
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="delete it to begin again"):
        run.pretrain(small(steps=2), copied)


def test_recipes() -> None:
    for plan in RECIPES.values():
        rates = [plan.rate(s) for s in range(plan.steps)]
        assert max(rates) == plan.lr and rates[-1] < plan.lr / 100
        assert all(r == plan.lr for r in rates[plan.warmup : plan.steps - plan.decay])
    with pytest.raises(MFuserError, match="no 'contrasts'; did you mean 'contrast'"):
        recipe("vfm", contrasts=1)
    with pytest.raises(MFuserError, match="steps = 5, decay = 6"):
        recipe("vfm", steps=5, decay=6)


def test_pairs_show_the_same_places() -> None:
    """With one style for both crops of a pair, the shared patches are the same but for noise."""
    batch = batches.pairs(3, 0, 6)
    assert batch.first.shape == batch.second.shape == (6, 64, 128, 3)
    assert batch.masks.mean((1, 2)).min() >= 0.25
    again = batches.pairs(3, 0, 6)
    np.testing.assert_array_equal(batch.first, again.first)
    assert (batches.pairs(3, 1, 6).first != batch.first).any()
    assert set(np.unique(batch.geometry[..., batches.DEPTHS :])) <= {0.0, 1.0}


def test_contrast_lines_up_the_two_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower that knows each patch's place in the scene has no contrast loss; one whose second
    crop is shifted by a patch has."""
    from mfuser_streets.pretrain.losses import ImageLosses

    heads = ImageLosses(64)
    heads.joint = torch.nn.Identity()  # type: ignore[assignment]
    for step in range(6):
        batch = batches.pairs(4, step, 2)
        h, w = batches.CROP
        scene = torch.randn(2, h + 10, w + 20, 64) * 9
        dy, dx = batch.shift
        first, second = scene[:, 5 : 5 + h, 10 : 10 + w], scene[:, 5 + dy :, 10 + dx :][:, :h, :w]
        seen = [
            (x.flip(2) if m else x).reshape(2, h * w, 64)
            for x, m in zip((first, second), batch.mirrored, strict=True)
        ]
        assert heads._contrast(seen, batch) < 0.1
        assert heads._contrast([seen[0], seen[1].roll(1, 1)], batch) > 1


def test_every_word_is_one_token() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    words = SimpleTokenizer(bpe_path=str(towers.FOLDER / "mini-vlm.bpe.gz"))
    assert all(len(words.encode(w)) == 1 for w in captions.WORDS)
    config = json.loads((towers.FOLDER / "mini-vlm.json").read_text("utf-8"))
    assert config["text_cfg"]["vocab_size"] == words.vocab_size
    # What is outside the vocabulary is spelled, as CLIP's tokenizer does.
    assert len(words.encode("zebra")) > 1


def test_the_tokenizer_that_ships_is_what_the_code_makes(tmp_path: Path) -> None:
    size = tokenizer.write(tmp_path / "made.gz")
    assert (tmp_path / "made.gz").read_bytes() == (towers.FOLDER / "mini-vlm.bpe.gz").read_bytes()
    assert (
        size == json.loads((towers.FOLDER / "mini-vlm.json").read_text())["text_cfg"]["vocab_size"]
    )


def test_the_weights_say_what_they_are(finished: Path) -> None:
    (path,) = finished.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()[towers.TOLD])
    assert told["name"] == "mini-vfm" and told["world"] == 1
    assert told["recipe"]["steps"] == 2
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}


def test_weights_of_another_world_are_refused(finished: Path, tmp_path: Path) -> None:
    (path,) = finished.glob("*.safetensors")
    from mfuser_plugins.backbones.timm import TimmSpec

    spec = TimmSpec(model=towers.VFM_MODEL, weights=str(path))
    assert spec.build((96, 192)).grid == (12, 24)
    other = tmp_path / "other.safetensors"
    save_file(load_file(path), other, metadata={towers.TOLD: '{"name": "mini-vfm", "world": 0}'})
    with pytest.raises(WeightsError, match=r"version 0 of the miniature world.*mini-vfm"):
        spec.model_copy(update={"weights": str(other)}).build((96, 192))


def test_the_command(tmp_path: Path, mfuser: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfuser_streets.pretrain import recipe as recipes

    monkeypatch.setitem(recipes.RECIPES, "vfm", small(steps=2))
    made = mfuser("world", "pretrain", "vfm", "--out", tmp_path / "a", "--json")
    assert made.code == 0
    told = json.loads(made.out)
    assert run.digest(Path(told["weights"])) == told["sha256"]
    again = mfuser("world", "pretrain", "vfm", "--out", tmp_path / "a", "--without", "masked")
    assert again.code == 2 and "masked = 0.0 is asked for: give another --out" in again.err
    assert mfuser("world", "pretrain", "vlmm").code == 2
    assert "did you mean 'pretrain'" in mfuser("world", "pretrian").err


def test_interrupted_before_anything_is_saved(
    tmp_path: Path, mfuser: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: run.Pretraining, step: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Pretraining, "step", interrupt)
    stopped = mfuser("world", "pretrain", "vfm", "--out", tmp_path, "--steps", 2, "--decay", 1)
    assert stopped.code == 130 and "nothing is saved" in stopped.err


def test_words_and_the_first_losses_take_turns() -> None:
    chosen = recipe("vlm", warm_start=2, refresh=3)
    turns = [chosen.on_words(k) for k in range(8)]
    assert turns == [False, False, True, True, False, True, True, False]
    assert all(recipe("vlm", warm_start=0, refresh=0).on_words(k) for k in range(4))
    assert not any(recipe("vfm").on_words(k) for k in range(4))
    assert "refresh" not in recipe("vfm").as_json()
