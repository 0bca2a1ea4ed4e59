"""`mfuser describe` on the compatibility of two encoders."""

from __future__ import annotations

import pytest
import torch

from mfuser import MFuserError, Registry
from mfuser.model.assembly import build_model, sketch
from mfuser.reporting import compatibility
from mfuser.reporting.describe import describe, render


def told(tiny: Registry, **overrides: object) -> str:
    spec = tiny.pairing("plain", overrides)
    return "\n".join(compatibility.warnings(spec, sketch(spec)))


def test_what_is_done_between_unequal_partners(tiny: Registry) -> None:
    facts = describe(tiny.pairing("plain", {"vlm": {"patch_size": 32}}))
    assert facts["resampling"] == [
        "taps of the vlm: 2x3 to 4x6",
        "final vfm patches: 4x6 to 2x3, where they are added to the vlm's",
    ]
    assert facts["projections"] == [
        "final vfm tokens: 32 to 48",
        "taps: 80 to 32, at each of 4 strides",
        "vlm tokens to the joint space: 48 to 24",
    ]
    text = "\n".join(x for x in render("plain", facts) if isinstance(x, str))
    # Blocks 3 and 2: a position takes one block of the VLM and one or two of the VFM.
    assert "blocks of a position: vfm 1 to 2, vlm 1" in text
    assert (
        "trains: " in text and "memory of a training step" in text and "time of one image" in text
    )


def test_grids_that_differ_by_more_than_two_are_warned_of(tiny: Registry) -> None:
    assert "differ by a factor of" not in told(tiny, vlm={"patch_size": 32})
    text = told(tiny, vfm={"patch_size": 8}, vlm={"patch_size": 32})
    assert "the grids 8x12 (vfm) and 2x3 (vlm) differ by a factor of 4.0" in text
    assert "each patch of the vlm is spread over several of the vfm" in text


def test_pixels_that_no_patch_holds(tiny: Registry) -> None:
    text = told(tiny, image_size=[70, 96])
    assert "70x96 is not a multiple of the vfm's patch 16x16: its last 6 rows and 0 columns" in text


def test_frozen_random_numbers(tiny: Registry) -> None:
    assert "the vfm starts from random numbers and is frozen" in told(tiny)
    assert "the vfm starts" not in told(tiny, vfm={"freeze": False})


def test_a_text_tower_without_prompt_support(tiny: Registry) -> None:
    spec = tiny.pairing("plain")
    model = sketch(spec)
    vlm = model.encoder.vlm
    assert vlm is not None

    def encode_text(ids: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        raise MFuserError("its tokens are not accessible")

    vlm.encode_text = encode_text  # type: ignore[method-assign]
    text = "\n".join(compatibility.warnings(spec, model))
    assert "takes no prompt of 2 learned tokens (its tokens are not accessible)" in text
    assert "prompt.context = 0" in text


def test_memory_is_that_of_the_real_model(tiny: Registry) -> None:
    spec = tiny.pairing("plain")
    real = build_model(spec)
    found = compatibility.memory(sketch(spec), torch.empty(1, 3, *spec.image_size, device="meta"))
    assert found is not None
    tensors = [*real.parameters(), *real.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    assert found["weights"] * 2**30 == pytest.approx(size)
    trained = sum(4 * p.numel() for p in real.parameters() if p.requires_grad)
    assert found["gradients and optimizer"] * 2**30 == pytest.approx(3 * trained)

    saved: dict[int, int] = {}
    own = {t.data_ptr() for t in tensors}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(storage)
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, labels = torch.rand(1, 3, *spec.image_size), torch.zeros(1, *spec.image_size).long()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        real.train()(images, labels)
    # Fused attention saves other tensors on the CPU than the meta device lays out.
    assert found["activations of one image"] * 2**30 == pytest.approx(sum(saved.values()), rel=0.2)
