"""Models as folders: bit-identical round trips, cards that the hub's own parser reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import mfuser
from mfuser import DGSSModel, Registry, build_model
from mfuser.engine.checkpoints import FINAL, load_model
from mfuser.engine.pretrained import CARD, CONFIG, FILES, from_pretrained, save_pretrained
from mfuser.engine.run import evaluate
from mfuser.errors import CheckpointError, WeightsError
from mfuser.plugins import origins
from mfuser.reporting.card import local_files

IMAGES = (torch.arange(2 * 3 * 80 * 120) % 251).to(torch.uint8).reshape(2, 3, 80, 120)


def shaken(model: DGSSModel) -> DGSSModel:
    """The model with every trained parameter changed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pairing", ["tiny", "lone"])
def test_the_same_outputs_bit_for_bit(
    tiny: Registry, tmp_path: Path, pairing: str, full: bool
) -> None:
    model = shaken(build_model(pairing, tiny, seed=3))
    assert model.save_pretrained(tmp_path / "out", full=full) == tmp_path / "out"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*FILES}
    again = mfuser.from_pretrained(tmp_path / "out")
    assert torch.equal(again.segment(IMAGES), model.segment(IMAGES))
    assert again.classes == model.classes and not again.training
    save_pretrained(again, tmp_path / "twice")  # what is complete stays so
    sizes = {(tmp_path / f / FINAL).stat().st_size // 4096 for f in ("out", "twice")}
    assert len(sizes) == 1 or not full
    assert torch.equal(from_pretrained(tmp_path / "twice").segment(IMAGES), model.segment(IMAGES))


def test_a_run_is_kept_with_its_record(tiny: Registry, trained: Path, tmp_path: Path) -> None:
    """Commands take the folder as a run; so does evaluation, on the run's own targets."""
    model = from_pretrained(trained, registry=tiny)
    model.save_pretrained(tmp_path / "kept")
    config = json.loads((tmp_path / "kept" / CONFIG).read_text())
    assert config["library_name"] == "mfuser" and config["run"]["pairing_name"] == "plain"
    ours = evaluate(trained, registry=tiny, out=tmp_path / "a", limit=1, quiet=True).report
    theirs = evaluate(
        tmp_path / "kept", registry=tiny, out=tmp_path / "b", limit=1, quiet=True
    ).report
    assert ours.domains == theirs.domains


def test_encoders_are_compared(tiny: Registry, tmp_path: Path) -> None:
    """By reference, the frozen encoders must be those of the training."""
    model = build_model("plain", tiny, seed=1)
    model.save_pretrained(tmp_path / "out")
    assert load_model(tmp_path / "out")[1].meta["run"] == {"seed": 1}
    model.record = {"run": {"seed": 2}}  # which builds other random towers
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="not those it was trained with"):
        from_pretrained(tmp_path / "other")


def test_full_needs_no_other_file(tiny: Registry, tmp_path: Path) -> None:
    """The file of an encoder's weights has gone: all weights are inside, or it is named."""
    model = build_model("lone", tiny)
    vfm = model.spec.vfm.model_copy(update={"weights": "gone/vit.pth"})  # type: ignore[union-attr]
    model.spec = model.spec.model_copy(update={"vfm": vfm})
    assert local_files(model.spec) == {"vfm.weights": "gone/vit.pth"}
    model.save_pretrained(tmp_path / "full", full=True)
    assert torch.equal(from_pretrained(tmp_path / "full").segment(IMAGES), model.segment(IMAGES))
    model.save_pretrained(tmp_path / "trained")
    assert 'settings=["vfm.weights=PATH"]' in (tmp_path / "trained" / CARD).read_text()
    with pytest.raises(WeightsError, match="gone/vit.pth"):
        from_pretrained(tmp_path / "trained")


def test_files_that_do_not_belong_together(tiny: Registry, tmp_path: Path) -> None:
    build_model("lone", tiny).save_pretrained(tmp_path / "a")
    build_model("lone", tiny, image_size=[32, 32]).save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b" / CONFIG, tmp_path / "a" / CONFIG)
    with pytest.raises(CheckpointError, match="does not belong to .* pairing is another"):
        from_pretrained(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        from_pretrained(tmp_path / "a")


def test_folders_that_are_refused(tiny: Registry, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a run; choose another"):
        build_model("lone", tiny).save_pretrained(trained)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        build_model("lone", tiny).save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="has no revision 'v1'"):
        from_pretrained(trained, revision="v1")


def test_a_plugin_that_is_not_here_is_named(
    tiny: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A component's package is written into the file; where it is missing, the error names it."""
    monkeypatch.setattr(origins, "_packages", lambda: {"mfuser_plugins": "mfuser-swap 0.3"})
    build_model("lone", tiny).save_pretrained(tmp_path / "out")
    known = dict(tiny.components._by_kind["decoder"])
    monkeypatch.setitem(tiny.components._by_kind, "decoder", known)
    del known["linear"]
    with pytest.raises(
        CheckpointError, match="decoder 'linear' comes with the package 'mfuser-swap 0.3'"
    ):
        from_pretrained(tmp_path / "out", registry=tiny)


def test_built_in_components_need_no_package(tiny: Registry) -> None:
    assert origins.origins(tiny.pairing("tiny")) == []


def test_the_card(tiny: Registry, tmp_path: Path) -> None:
    build_model("plain", tiny).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.library_name == "mfuser" and card.data.license == "other"
    assert "vit_tiny_patch16_224" in card.text and "published without an evaluation" in card.text
    assert "| vlm: ViT-B-16 | by reference | not known |" in card.text
