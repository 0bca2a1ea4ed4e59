"""Similarity maps: what the model's own alignment says, for its classes and for any words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mfuser import DGSSModel, Registry, build_model
from mfuser.engine.similarity import check_texts, similarity
from mfuser.errors import MFuserError
from mfuser.model.assembly import with_classes


@pytest.fixture(scope="module")
def model(tiny: Registry) -> DGSSModel:
    return build_model("tiny", tiny)


IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def aligned(model: DGSSModel) -> torch.Tensor:
    """(B, K, H, W), from the model's own pass."""
    with torch.no_grad():
        return F.interpolate(model(IMAGES).alignment, (64, 96), mode="bilinear")


def test_a_class_is_answered_by_its_own_query(model: DGSSModel) -> None:
    found = similarity(model, IMAGES, ["car", "road"])
    wanted = aligned(model)[:, [model.classes.index("car"), model.classes.index("road")]]
    assert found.shape == (2, 2, 64, 96) and found.abs().max() <= 1
    assert torch.allclose(found, wanted, atol=1e-6)


def test_other_words_join_the_classes(tiny: Registry) -> None:
    words = "a wet road in the light of evening"  # more tokens than a class name has slots
    model = build_model("tiny", tiny, decoder="text_similarity")
    found = similarity(model, IMAGES, ["road", words, "car"])
    model.spec = model.spec.model_copy(
        update={"prompt": model.spec.prompt.model_copy(update={"slots": 10})}
    )
    wanted = aligned(with_classes(model, (*model.classes, words)))
    assert torch.allclose(found[:, 1], wanted[:, -1], atol=1e-5)
    assert torch.allclose(found[:, 2], wanted[:, model.classes.index("car")], atol=1e-5)
    assert not torch.allclose(found[:, 1], found[:, 0], atol=1e-2)


def test_alone_is_the_vision_language_model_itself(model: DGSSModel) -> None:
    vlm = model.encoder.vlm
    assert vlm is not None
    with torch.no_grad():
        library = vlm.model  # open_clip's own forward, its dense tokens
        library.visual.output_tokens = True
        _, tokens = library.visual(vlm.normalize(IMAGES))
        library.visual.output_tokens = False
        dense = tokens @ library.visual.proj
        text = library.encode_text(vlm.tokenize(["car"], 77))
    near = F.normalize(dense, dim=-1) @ F.normalize(text, dim=-1)[0]
    wanted = F.interpolate(near.view(2, 1, 4, 6), (64, 96), mode="bilinear")
    assert torch.allclose(similarity(model, IMAGES, ["car"], alone=True), wanted, atol=1e-5)


def test_larger_images_by_windows_and_modes_kept(model: DGSSModel) -> None:
    pixels = (torch.rand(3, 80, 120) * 255).to(torch.uint8)
    model.train()
    model.pyramid.eval()
    found = similarity(model, pixels, ["sky"])
    assert model.training and not model.pyramid.training
    model.eval()
    corner = similarity(model, pixels[:, :64, :96], ["sky"])
    assert found.shape == (1, 1, 80, 120)
    assert torch.allclose(found[..., :10, :10], corner[..., :10, :10], atol=1e-5)  # one window


def test_half_precision(model: DGSSModel, tiny: Registry) -> None:
    half = build_model("tiny", tiny).to(torch.bfloat16)
    close = similarity(half, IMAGES, ["sky"]) - similarity(model, IMAGES, ["sky"])
    assert close.abs().max() < 0.05


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "no text"),
        (["  "], "no text"),
        (["car", "word " * 90], r"cannot take 'word word [^']{1,60}': 2 context tokens"),
    ],
)
def test_bad_texts(model: DGSSModel, texts: list[str], says: str) -> None:
    with pytest.raises(MFuserError, match=says):
        check_texts(model, texts)


def test_a_model_without_text(tiny: Registry) -> None:
    with pytest.raises(MFuserError, match="no vision-language encoder"):
        similarity(build_model("lone", tiny), IMAGES, ["car"])
