from __future__ import annotations

import math

import pytest
import torch

from mfuser import DGSSModel, MFuserError, build_model
from mfuser_plugins.decoders.text_similarity import TextSimilaritySpec


def test_scores_are_the_alignment_map() -> None:
    decoder = TextSimilaritySpec(temperature=0.5).build((8,) * 4, 3, 6)
    similarity = torch.rand(1, 3, 2, 2)
    output = decoder([], None, similarity)
    assert torch.equal(decoder.semantic_logits(output, (2, 2)), similarity * 2)
    assert decoder.semantic_logits(output, (5, 7)).shape == (1, 3, 5, 7)
    assert not list(decoder.parameters())


def test_loss_is_the_mean_over_labeled_pixels() -> None:
    decoder = TextSimilaritySpec(temperature=1.0).build((8,) * 4, 2, 6)
    output = decoder([], None, torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]]))
    labels = torch.tensor([[[0, 255]]])
    assert math.isclose(
        decoder.loss(output, labels)["loss_ce"], math.log(1 + math.exp(-2)), rel_tol=1e-6
    )
    assert decoder.loss(output, torch.full((1, 1, 2), 255))["loss_ce"] == 0


def test_needs_the_map() -> None:
    with pytest.raises(MFuserError, match="alignment map"):
        TextSimilaritySpec().build((8,) * 4, 2, 6)([torch.rand(1, 8, 2, 2)])


def test_the_model_hands_the_map_on(tiny) -> None:  # type: ignore[no-untyped-def]
    model = build_model("plain", tiny, decoder="text_similarity")
    assert isinstance(model, DGSSModel)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        output = model(images)
    assert output.alignment is not None
    assert torch.equal(output.decoder.masks[-1], output.alignment / 0.07)
    assert model.segment(images).shape == (1, 19, 64, 96)


def test_refused_without_a_vlm(tiny) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MFuserError, match="decoder 'text_similarity' takes class queries"):
        build_model("lone", tiny, decoder="text_similarity")
