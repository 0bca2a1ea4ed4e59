"""The precision of training, evaluation and prediction, and the choice of what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd import photo
from PIL import Image
from stopping import gone_in

import mfuser
from mfuser import Registry, build_model
from mfuser.engine import checkpoints, memory
from mfuser.engine.memory import Estimate, make_ready
from mfuser.engine.precision import Choice, Precision
from mfuser.engine.train import train
from mfuser.errors import MFuserError
from mfuser.reporting.compatibility import memory as measured_by_hooks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = torch.bfloat16


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that computes in bfloat16, as far as is asked."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture
def volta(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that emulates it."""
    supported = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")


# ---- what is chosen


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_frozen_weights_on_a_cpu_are_single_unless_asked(tiny: Registry, asked: str) -> None:
    recipe = tiny.recipe("tiny", [f"frozen_dtype={asked}"])
    chosen = Precision.of_training(recipe, CPU)
    assert chosen.frozen == (HALF if asked == "bfloat16" else None) and not chosen.tf32
    frozen = ", frozen weights in bfloat16" if asked == "bfloat16" else ""
    assert str(chosen) == f"float32{frozen}"


def test_cuda_lowers_them_and_multiplies_by_tf32(tiny: Registry, ampere: None) -> None:
    chosen = Precision.of_training(tiny.recipe("tiny"), CUDA)
    assert str(chosen) == "float32 by TF32, frozen weights in bfloat16"
    chosen = Precision.of_training(tiny.recipe("tiny", ["frozen_dtype=float32"]), CUDA)
    assert str(chosen) == "float32 by TF32"
    chosen = Precision.of_training(tiny.recipe("tiny", ["precision=bf16"]), CUDA)
    assert str(chosen) == "bfloat16"


def test_inference_follows_the_training_on_cuda_alone(tiny: Registry, ampere: None) -> None:
    run = {"recipe": tiny.recipe("tiny", ["precision=bf16"]).model_dump(mode="json")}
    assert str(Precision.of_inference(CUDA, run)) == "bfloat16"
    assert str(Precision.of_inference(CPU, run)) == "float32"
    assert str(Precision.of_inference(CUDA, run, "no")) == "float32"
    assert str(Precision.of_inference(CUDA, run, "fp16")) == "float16"
    assert str(Precision.of_inference(CUDA, {})) == "float32 by TF32, frozen weights in bfloat16"


def test_a_card_without_bfloat16_keeps_single(tiny: Registry, volta: None) -> None:
    assert str(Precision.of_training(tiny.recipe("tiny"), CUDA)) == "float32 by TF32"
    with pytest.raises(MFuserError, match='"bf16": Tesla V100 has no arithmetic for bfloat16'):
        Precision.of_training(tiny.recipe("tiny", ["precision=bf16"]), CUDA)


def test_float16_is_refused_on_a_cpu(mfuser: Any, trained: Path) -> None:
    done = mfuser("evaluate", trained, "--precision", "fp16")
    assert done.code == 2 and "needs a GPU" in done.err and "(--precision no)" in done.err


def test_a_gpu_of_apples_is_asked_for_where_there_is_none(mfuser: Any, trained: Path) -> None:
    done = mfuser("evaluate", trained, "--device", "mps")
    assert done.code == 2 and "--device mps: torch sees no GPU of Apple's here" in done.err


# ---- a run with lowered encoders


@pytest.fixture(scope="module")
def half(tiny: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, its frozen weights in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "run"
    options = ["frozen_dtype=bfloat16", "checkpointing=auto"]
    mfuser.train("plain", folder, registry=tiny, recipe="tiny", recipe_settings=options, quiet=True)
    return folder


def evaluated(run: Path, out: Path, precision: Choice) -> dict[str, Any]:
    done = mfuser.evaluate(run, out=out, precision=precision, quiet=True)
    return done.report.as_json()


def test_its_record_says_so(half: Path) -> None:
    run = json.loads((half / "run.json").read_text("utf-8"))
    assert run["precision"] == "float32, frozen weights in bfloat16"
    report = (half / "report.md").read_text("utf-8")
    assert "computed in float32, frozen weights in bfloat16" in report


@pytest.mark.parametrize(
    ("precision", "said"),
    [("no", "float32"), ("bf16", "bfloat16"), ("auto", "float32, frozen weights in bfloat16")],
)
def test_evaluation_in_each_precision(
    half: Path, tmp_path: Path, precision: Choice, said: str
) -> None:
    report = json.loads((half / "report.json").read_text("utf-8"))
    other = evaluated(half, tmp_path, precision)
    assert other["protocol"]["precision"] == said
    if precision == "auto":  # that of the training
        assert other == report
        return
    assert other["domains"] != report["domains"]
    for name, domain in report["domains"].items():
        assert other["domains"][name]["accuracy"] == pytest.approx(domain["accuracy"], abs=0.05)


def test_prediction_in_each_precision(half: Path, tmp_path: Path, mfuser: Any) -> None:
    path, masks = photo(tmp_path / "a.png"), {}
    for precision in ("no", "bf16"):
        out = tmp_path / precision
        done = mfuser("predict", half, path, "--out", out, "--precision", precision)
        assert done.code == 0, done.err
        with Image.open(out / "a.mask.png") as mask:
            masks[precision] = np.array(mask)
    assert (masks["no"] == masks["bf16"]).mean() > 0.9


def test_stopped_and_resumed_equals_never_stopped(
    tiny: Registry, begin: Any, tmp_path: Path
) -> None:
    run = begin("plain", "frozen_dtype=bfloat16")
    train(tiny, run, tmp_path / "a")
    with gone_in(3):
        train(tiny, run, tmp_path / "b")
    train(tiny, run, tmp_path / "b", resume=True)
    one, other = (checkpoints.read(tmp_path / n / checkpoints.FINAL).model for n in "ab")
    assert list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


# ---- what is computed again


def test_the_estimate_falls_with_every_position() -> None:
    estimate = Estimate(fixed=10, kept=30, least=6, positions=4)
    assert [estimate.total(k) for k in range(5)] == [40, 40, 34, 28, 22]


@pytest.mark.parametrize(
    ("room", "chosen", "said"),
    [
        (40, 0, "all activations are kept"),
        (36, 2, "activations of the last 2 of 4 positions and of the decoder are computed again"),
        (9, 4, "activations of all positions and of the decoder are computed again; "),
    ],
)
def test_auto_computes_again_what_memory_asks(
    tiny: Registry, monkeypatch: pytest.MonkeyPatch, room: float, chosen: int, said: str
) -> None:
    monkeypatch.setattr(memory, "estimate", lambda *_: Estimate(10, 30, 6, 4))
    monkeypatch.setattr(memory, "free", lambda device: room / memory.SHARE)
    model = build_model("lone", tiny)
    (line,) = make_ready(model, tiny.recipe("tiny", ["checkpointing=auto"]), CPU)
    assert said in line and ("may not be enough: lower batch_size" in line) == (room < 10)
    assert model.encoder.checkpointed == chosen
    assert model.encoder.checkpointing == (chosen > 0) == model.decoder.checkpointing


def test_the_estimate_is_of_the_pairing_and_the_batch(tiny: Registry) -> None:
    spec = tiny.pairing("tiny")
    one = memory.estimate(spec, tiny.recipe("tiny"), Precision(CPU))
    four = tiny.recipe("tiny", ["batch_size=4"])
    half = memory.estimate(spec, four, Precision(CPU, frozen=HALF))
    assert one is not None and half is not None
    assert half.kept == 4 * one.kept > 4 * one.least and half.fixed < one.fixed
    assert memory.free(CPU) > 1e8


def test_what_is_computed_again_is_not_kept_and_changes_no_gradient(tiny: Registry) -> None:
    model = build_model("tiny", tiny)
    images, labels = torch.rand(1, 3, 64, 96), torch.randint(0, 19, (1, 64, 96))
    kept, gradients = [], []
    for positions in (0, 1, None):
        memory.recompute(model, positions)
        found = measured_by_hooks(model, images)
        assert found is not None
        kept.append(found["activations of one image"])
        model.zero_grad()
        torch.manual_seed(0)
        torch.stack(list(model.train()(images, labels).values())).sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(trained)
    assert kept[0] > kept[1] > kept[2]
    for others in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
