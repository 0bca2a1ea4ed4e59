from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MASK_DECODER
from torch import Tensor

from mfuser import MFuserError
from mfuser_plugins.decoders._mask_losses import MaskLosses, class_masks
from mfuser_plugins.decoders.mask2former import (
    Mask2Former,
    Mask2FormerSpec,
    assign,
    match,
    pair_costs,
)
from mfuser_plugins.decoders.text_mask2former import TextMask2FormerSpec

SMALL = {**MASK_DECODER, "num_points": 64}


def small(classes: int = 4, queries: int = 7) -> Mask2Former:
    return Mask2FormerSpec(queries=queries, **SMALL).build((6,) * 4, classes, None)


def pyramid(batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 6, n, n + 1) for n in (12, 6, 3, 2)]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_assignment_is_the_cheapest(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 4))
    rows = data.draw(st.integers(columns, 5))
    costs = np.random.default_rng(data.draw(st.integers(0, 999))).normal(size=(rows, columns))
    queries = assign(costs)
    assert len(set(queries.tolist())) == columns
    best = min(
        sum(costs[q, c] for c, q in enumerate(order))
        for order in permutations(range(rows), columns)
    )
    assert np.isclose(costs[queries, np.arange(columns)].sum(), best)


def test_assignment_survives_a_diverged_model() -> None:
    assert sorted(assign(np.array([[np.nan, 1.0], [np.inf, np.nan]])).tolist()) == [0, 1]


def test_pair_costs_are_the_losses_of_each_pair() -> None:
    logits, targets = torch.randn(3, 20).double(), torch.rand(2, 20).double()
    probability = torch.rand(3, 2).double()
    costs = pair_costs(logits, targets, probability, MaskLosses(cls_weight=2, mask_weight=3))
    for q in range(3):
        for n in range(2):
            entropy = F.binary_cross_entropy_with_logits(logits[q], targets[n])
            p = logits[q].sigmoid()
            dice = 1 - (2 * (p * targets[n]).sum() + 1) / (p.sum() + targets[n].sum() + 1)
            want = 3 * entropy + 5 * dice - 2 * probability[q, n]
            assert torch.isclose(costs[q, n], want, rtol=1e-9)


def test_queries_that_show_a_class_answer_for_it() -> None:
    labels = torch.full((2, 8, 8), 255)
    labels[0, :4], labels[0, 4:], labels[1, :, :3] = 2, 0, 1
    there = class_masks(labels, 3)
    masks, classes = torch.full((2, 5, 8, 8), -9.0), torch.zeros(2, 5, 4)
    masks[0, 4, :4] = masks[0, 1, 4:] = masks[1, 3, :, :3] = 9.0
    swapped = masks[:, [1, 0, 2, 3, 4]]  # of another prediction
    points = [[torch.rand(1, 200, 2) for _ in range(2)] for _ in range(2)]
    predictions = [(masks, classes), (swapped, classes)]
    first, second = match(predictions, there, [2, 1], points, MaskLosses())
    # Image by image, classes ascending, as the masks of truth are.
    assert there.image.tolist() == [0, 0, 1] and first[0].tolist() == [1, 4, 3]
    assert first[1].tolist() == [[3, 0, 3, 3, 2], [3, 3, 3, 1, 3]]
    assert second[0].tolist() == [0, 4, 3]
    assert second[1].tolist() == [[0, 3, 3, 3, 2], [3, 3, 3, 1, 3]]


def test_class_probability_decides_between_equal_masks() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    there = class_masks(labels, 2)
    classes = torch.zeros(1, 3, 3)
    classes[0, 2, 0] = 4.0
    predictions = [(torch.ones(1, 3, 8, 8), classes)]
    ((query, _),) = match(predictions, there, [1], [[torch.rand(1, 50, 2)]], MaskLosses())
    assert query.tolist() == [2]


def test_every_parameter_learns_from_the_loss() -> None:
    decoder = small()
    output = decoder(pyramid())
    assert len(output.masks) == 4 and output.masks[-1].shape == (2, 7, 12, 13)
    assert output.classes[-1].shape == (2, 7, 5)
    losses = decoder.loss(output, torch.randint(0, 4, (2, 33, 26)))
    names = {f"loss_{part}" for part in ("cls", "mask", "dice")}
    assert set(losses) == names | {f"d{i}.{name}" for i in range(3) for name in names}
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_learns_to_segment() -> None:
    labels = torch.zeros(1, 24, 26, dtype=torch.long)
    labels[:, :, 13:], labels[:, :5] = 1, 255
    decoder, features = small(classes=2, queries=3), pyramid(1)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(60):
        losses = decoder.loss(decoder(features), labels)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    scores = decoder.semantic_logits(decoder(features), (24, 26))
    right = (scores.argmax(1) == labels)[:, 5:]
    assert right.float().mean() > 0.9


def test_images_without_a_labeled_pixel() -> None:
    decoder = small()
    losses = decoder.loss(decoder(pyramid(1)), torch.full((1, 24, 26), 255))
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0 and losses["loss_cls"] > 0
    torch.stack(list(losses.values())).sum().backward()


def test_takes_no_text() -> None:
    decoder, features = small().eval(), pyramid()
    told = decoder(features, torch.randn(2, 4, 9))
    assert torch.equal(told.masks[-1], decoder(features).masks[-1])
    assert not any("text" in name for name in decoder.state_dict())
    assert not Mask2FormerSpec.needs_text and TextMask2FormerSpec.needs_text


def test_fewer_queries_than_classes() -> None:
    with pytest.raises(MFuserError, match="3 queries .* 4 classes.*set queries to 4"):
        small(classes=4, queries=3)
    labels = torch.arange(4).view(1, 2, 2)
    decoder = small(classes=4, queries=4)
    assert decoder.loss(decoder(pyramid(1)), labels)["loss_mask"].isfinite()
