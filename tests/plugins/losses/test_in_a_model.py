"""Losses beside the decoder's own: in a model, in a run, from a stranger, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfuser import (
    DGSSModel,
    MFuserError,
    PairingSpec,
    Registry,
    build_model,
    from_pretrained,
    load_registry,
    save_pretrained,
)
from mfuser.engine.checkpoints import trained_state

LANGUAGE = {"name": "language_regularization", "slots": 16}


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96))


def step(model: DGSSModel, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    losses = model.train()(*batch())
    assert isinstance(losses, dict)
    return losses


def test_every_loss_in_one_model(tiny: Registry) -> None:
    """They are added to what was there before, which stays the same."""
    names = ["consistency", {"name": "ohem", "weight": 2.0}, "class_balanced"]
    vlm = {"freeze": False}
    before = step(build_model("plain", tiny, vlm=vlm, losses=["ohem"]))
    once = before.pop("ohem.ce")
    model = build_model("plain", tiny, vlm=vlm, losses=[*names, "vision_regularization", LANGUAGE])
    losses = step(model)
    for name, value in before.items():
        torch.testing.assert_close(losses[name], value)
    added = set(losses) - set(before)
    assert added == {
        *("consistency.kl", "ohem.ce", "class_balanced.ce", "vision_regularization.global"),
        "language_regularization.ce",
    }
    torch.testing.assert_close(losses["ohem.ce"], 2 * once)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith("before.") for n in trained)
    for name in added:
        found = torch.autograd.grad(
            losses[name], list(trained.values()), retain_graph=True, allow_unused=True
        )
        assert any(g is not None and g.any() for g in found), name


def test_other_parts_start_from_the_same_numbers(tiny: Registry) -> None:
    plain, more = build_model("tiny", tiny), build_model("tiny", tiny, losses=["ohem", LANGUAGE])
    state = more.state_dict()
    assert set(state) == set(plain.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_shares_and_logits_are_probabilities_alike(tiny: Registry) -> None:
    from mfuser.model.criteria import log_probs

    small = {"width": 16, "heads": 2, "pixel_layers": 1, "pixel_ffn": 16, "layers": 1, "ffn": 16}
    masks = {"name": "mask2former", **small, "norm_groups": 4}
    for decoder in ("linear", masks):
        model = build_model("lone", tiny, decoder=decoder).eval()
        images = batch()[0]
        with torch.no_grad():
            output = model.predict(images)
            found = log_probs(model.decoder, output.decoder, 19, torch.Size((64, 96))).exp()
            scores = model.decoder.semantic_logits(output.decoder, (64, 96))
        torch.testing.assert_close(found.sum(1), torch.ones(2, 64, 96))
        expected = scores.softmax(1) if decoder == "linear" else scores / scores.sum(1, True)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tuning", [None, {"name": "lora", "rank": 2}])
def test_the_model_before_training_stays_as_it_was(tiny: Registry, tuning: Any) -> None:
    """Alone and untrained, the vision-language model is its own reference: nothing to add."""
    options: dict[str, Any] = {"vfm": "none", "fusion": "none"}
    options |= {"vlm": {"freeze": False}} if tuning is None else {"tuning": tuning}
    losses = [{"name": "vision_regularization", "dense": True}]
    model = build_model("plain", tiny, **options, losses=losses)
    assert model.before is not None
    reference = {n: p.clone() for n, p in model.before.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for seed in range(3):
        optimizer.zero_grad()
        terms = step(model, seed)
        found.append(float(terms["vision_regularization.global"].detach()))
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    assert found[0] < 1e-10 < 1e-8 < found[2]
    assert all(torch.equal(p, reference[n]) for n, p in model.before.named_parameters())
    assert not model.before.training
    assert not any(name.startswith("before.") for name in trained_state(model))


def test_a_frozen_tower_is_its_own_reference(tiny: Registry) -> None:
    model = build_model("tiny", tiny, losses=["vision_regularization"])
    assert model.before is None and "vision_regularization.global" in step(model)


def test_a_run_logs_saves_and_resumes(begin: Any, tiny: Registry, tmp_path: Path) -> None:
    from mfuser.config.run import RunSpec
    from mfuser.engine.checkpoints import load_model
    from mfuser.engine.train import Trainer, train

    run: RunSpec = begin("plain")
    pairing = tiny.pairing("lone", {"losses": ["consistency", "ohem"]})
    run = run.model_copy(update={"pairing": pairing})
    train(tiny, run, tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert {"consistency.kl", "ohem.ce"} <= set(lines[-1])
    checkpoint = load_model(tmp_path / "a", tiny)[1]
    assert checkpoint.meta["pairing"]["losses"][0]["name"] == "consistency"
    assert RunSpec.read(tiny, checkpoint.meta["run"], "here").pairing == pairing
    # The same weights where the run was killed: views follow from the seed and the step.
    original = Trainer._step

    def killed(self: Trainer, number: int, batches: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, run, tmp_path / "b")
    train(tiny, run, tmp_path / "b", resume=True)
    again = load_model(tmp_path / "b", tiny)[1].model
    assert all(torch.equal(value, again[name]) for name, value in checkpoint.model.items())


def test_what_cannot_be_given_is_refused(tiny: Registry) -> None:
    alone = {"vfm": "none", "fusion": "none"}
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"vlm": "none", "enhancer": "none", "decoder": "linear", "losses": [LANGUAGE]},
            "loss 'language_regularization' compares with class texts, and there is no 'vlm'",
        ),
        (
            {**alone, "losses": ["vision_regularization"]},
            "and nothing here changes it: it is frozen, not tuned, and alone; leave the loss out",
        ),
        ({"losses": ["ohem", {"name": "ohem"}]}, "loss 'ohem' is given twice"),
        ({"losses": ["ohm"]}, "no loss component is called 'ohm'"),
        ({"losses": [{"name": "ohem", "weight": -1}]}, "greater than 0"),
    ]
    for options, reason in cases:
        with pytest.raises(MFuserError, match=reason):
            tiny.pairing("tiny", options)
    with pytest.raises(MFuserError, match="slots"):
        build_model("tiny", tiny, losses=["language_regularization"])  # 7 are too few


def test_a_pairing_without_losses_is_written_as_before(tiny: Registry) -> None:
    plain = tiny.pairing("tiny")
    assert "losses" not in plain.model_dump(mode="json")
    more = tiny.pairing("tiny", {"losses": ["ohem"]})
    table = more.model_dump(mode="json")
    assert table["losses"] == [{"weight": 1.0, "name": "ohem", "threshold": 0.7, "least": 0.1}]
    assert tiny.validate(PairingSpec, table, "here") == more


PLUGIN = '''
from typing import ClassVar

import torch
from torch import nn

from mfuser import Loss, LossSpec, hookimpl


class Contrast(Loss):
    """Neighboring levels of the pyramid are to be as strong as each other, by a learned factor."""

    def __init__(self, levels):
        super().__init__()
        self.factors = nn.Parameter(torch.ones(levels))

    def forward(self, given):
        strengths = torch.stack([level.abs().mean() for level in given.pyramid]) * self.factors
        return {"levels": strengths.var()}


class ContrastSpec(LossSpec, name="contrast"):
    """Equal strength of all levels of the pyramid."""

    def build(self, parts):
        return Contrast(len(parts.channels))


class VectorSpec(LossSpec, name="vector"):
    """Forgets to average."""

    needs: ClassVar = ("log_probs",)

    def build(self, parts):
        return Vector()


class Vector(Loss):
    def forward(self, given):
        return {"all": -given.log_probs.mean(1)}


@hookimpl
def mfuser_components():
    return [ContrastSpec, VectorSpec]
'''


def test_from_a_file(mfuser: Any, write_registry: Any, tmp_path: Path) -> None:
    """Trained, saved with its parameters, found again."""
    file = tmp_path / "contrast.py"
    file.write_text(PLUGIN, "utf-8")
    registry = write_registry(
        '\n[pairing.mine]\nextends = "plain"\nlosses = [{ name = "contrast" }]\n'
    )
    run = ("train", "mine", "--recipe", "tiny", "--registry", registry, "--plugin", file)
    done = mfuser(*run, "--out", tmp_path / "run", "--no-evaluate")
    assert done.code == 0, done.err
    from mfuser.engine.checkpoints import load_model

    loaded = load_registry(registry, plugins=[str(file)])
    model, checkpoint = load_model(tmp_path / "run", loaded)
    saved = checkpoint.model["criteria.contrast.factors"]
    assert (saved != 1).any()
    assert torch.equal(saved, model.criteria["contrast"].factors.detach())
    # A complete model answers without what only its losses read.
    save_pretrained(model, tmp_path / "whole", full=True)
    image = torch.rand(1, 3, 64, 96)
    again = from_pretrained(tmp_path / "whole", registry=loaded)
    torch.testing.assert_close(again.segment(image), model.segment(image))
    refused = mfuser(*run, "--out", tmp_path / "bad", "--set", 'losses=["vector"]')
    assert refused.code == 2
    assert "loss 'vector'" in refused.err and "forward()['all'] has shape" in refused.err
