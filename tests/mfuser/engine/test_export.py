"""Exported programs give the model's scores, at any batch, and hold no operator of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from untraced import without_tracing

from mfuser import DGSSModel, MFuserError, build_model
from mfuser.engine.export import Window, export


@pytest.fixture(scope="module")
def model(tiny: Any) -> DGSSModel:
    """Every part of a model, the towers of one block: tracing takes seconds for each."""
    shallow = ["vfm.options.depth=1", "vlm.options.vision_cfg.layers=1"]
    return build_model(tiny.pairing("tiny", shallow), seed=3)


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Both formats are written of one traced program; what the model runs there is measured
    elsewhere."""
    trace, traced = without_tracing(torch.export.export), {}

    def once(window: Window, *arguments: Any, **options: Any) -> Any:
        if window.model not in traced:
            traced[window.model] = trace(window, *arguments, **options)
        return traced[window.model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", once)
        patch.setattr(torch.onnx, "export", without_tracing(torch.onnx.export))
        yield


def test_torch_program(model: DGSSModel, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = export(model, tmp_path / "m.pt2", "torch")
    assert made.difference < 1e-5 and made.agreement > 0.999
    extra = {"mfuser.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("mfuser" in name for name in names) and any("aten" in name for name in names)
    assert json.loads(extra["mfuser.json"])["classes"] == list(model.classes)
    # The texts are constants: the tower that made them stays behind, and in the model.
    text = {n for n in weights if n.startswith("encoder.vlm.model.") and ".visual." not in n}
    assert text and not any(name.removeprefix("model.") in text for name in program.state_dict)
    kept = model.state_dict()
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    images = torch.rand(5, 3, *model.spec.image_size)
    scores = program.module()(images)
    expected = model.segment(images)
    assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()


def test_onnx_program(model: DGSSModel, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs mfuser[export]")
    made = export(model, tmp_path / "m.onnx", "onnx")
    assert made.difference < 1e-4 and made.agreement > 0.999
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    facts = json.loads(session.get_modelmeta().custom_metadata_map["mfuser"])
    assert facts["window"] == list(model.spec.image_size)
    images = torch.rand(4, 3, *model.spec.image_size)
    scores = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    expected = model.segment(images)
    assert (scores - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (scores.argmax(1) == expected.argmax(1)).float().mean() > 0.999


def test_a_program_that_differs_is_not_kept(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(tiny.pairing("lone", ["vfm.options.depth=1"]), seed=3)
    monkeypatch.setattr("mfuser.engine.export.TOLERANCE", {"torch": -1.0})
    with pytest.raises(MFuserError, match="differs from the model"):
        export(model, tmp_path / "m.pt2", "torch")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MFuserError, match=r"ends in \.onnx"):
        export(model, tmp_path / "m.pt2", "onnx")
