from __future__ import annotations

import math

import pytest
import torch
from golden import close, golden
from torch import Tensor

from mfuser.model.alignment import alignment_loss, score_map


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("align_softmax", "softmax"),
        ("align_siglip_official", "softmax"),
        ("align_sigmoid_extra", "sigmoid"),
    ],
)
def test_equals_the_released_loss(case: str, kind: str) -> None:
    wanted = golden("losses")
    scale: Tensor | float = 1 / 0.07
    bias = None
    if case != "align_softmax":
        scale, bias = wanted["siglip.logit_scale"].exp(), wanted["siglip.logit_bias"]
    scores = wanted["score_map"].requires_grad_()
    loss = alignment_loss(scores, wanted["gt_semantic_seg"].long(), scale, bias, kind)
    loss.backward()
    assert close(loss, wanted[f"{case}.loss"])
    assert scores.grad is not None and close(scores.grad, wanted[f"{case}.grad_score_map"])


def test_losses_by_hand() -> None:
    # One pixel of class 1, one ignored, at the map's own resolution: no interpolation.
    scores = torch.tensor([[[[0.5, 1.0]], [[-0.5, 1.0]]]], dtype=torch.float64)
    labels = torch.tensor([[[1, 255]]])
    loss = alignment_loss(scores, labels, 2.0)
    assert math.isclose(loss.item(), math.log1p(math.exp(2.0)) / 2, rel_tol=1e-12)
    assert torch.allclose(alignment_loss(scores, labels, 2.0, bias=-3.0), loss, rtol=1e-12)
    loss = alignment_loss(scores, labels, 2.0, -1.0, "sigmoid")
    logits = (2 * 0.5 - 1, 2 * -0.5 - 1)  # wrong class, right class
    by_hand = math.log1p(math.exp(logits[0])) + math.log1p(math.exp(-logits[1]))
    assert math.isclose(loss.item(), by_hand / 4, rel_tol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_crop_without_labels_costs_nothing(kind: str) -> None:
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = alignment_loss(scores, torch.full((1, 9, 7), 255), 10.0, None, kind)
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None and not scores.grad.any()


def test_score_map_is_the_cosine_per_patch() -> None:
    torch.manual_seed(0)
    dense, text = torch.randn(2, 6, 5).double(), torch.randn(2, 3, 5).double()
    scores = score_map(dense, text, (2, 3))
    assert scores.shape == (2, 3, 2, 3)
    for b, k, y, x in [(0, 0, 0, 0), (1, 2, 1, 0), (0, 1, 1, 2)]:
        patch = dense[b, y * 3 + x]
        cosine = (patch @ text[b, k]) / (patch.norm() * text[b, k].norm())
        assert torch.isclose(scores[b, k, y, x], cosine, rtol=1e-12)
