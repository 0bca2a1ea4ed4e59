"""Each loss against a plain reference in float64, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mfuser import DecoderOutput, Loss, LossInputs, LossParts, components

CLASSES, WIDTH, SIZE = 3, 5, (4, 6)


def encode(texts: list[str], slots: int | None) -> Tensor:
    """Embeddings that tell texts apart."""
    rows = [torch.tensor([math.sin(i * len(t) + ord(t[-1])) for i in range(WIDTH)]) for t in texts]
    return torch.stack(rows).double()


PARTS = LossParts(("road", "sky", "car"), (8, 8, 8, 8), WIDTH, encode)


def build(name: str, **options: Any) -> Loss:
    loss: Any = components("loss")[name].model_validate({"name": name, **options})
    return loss.build(PARTS)  # type: ignore[no-any-return]


def inputs(*names: str) -> LossInputs:
    """Random float64 leaves, and labels of which some are ignored."""
    labels = torch.randint(0, CLASSES, (2, *SIZE))
    labels[0, 0] = 255
    made = {
        "logits": torch.randn(2, CLASSES, *SIZE),
        "second": torch.randn(2, CLASSES, *SIZE),
        "queries": torch.randn(2, CLASSES, WIDTH),
        "visual": torch.randn(2, 7, WIDTH),
        "frozen": torch.randn(2, 7, WIDTH),
    }
    given = LossInputs(torch.rand(2, 3, *SIZE), labels, DecoderOutput([]))
    for name in names:
        setattr(given, name, made[name].double().requires_grad_(name != "frozen"))
    return given


def with_log_probs(given: Any) -> LossInputs:
    given.log_probs = given.logits.log_softmax(1)
    if hasattr(given, "second"):
        given.view = LossInputs(given.images, given.labels, given.output)
        given.view.log_probs = given.second.log_softmax(1)
    return given  # type: ignore[no-any-return]


def pixels(given: Any) -> list[tuple[Tensor, int]]:
    """(cross-entropy, class) of every labeled pixel, one at a time."""
    found = []
    for b, y, x in torch.nonzero(given.labels != 255).tolist():
        k = int(given.labels[b, y, x])
        p = given.logits[b, :, y, x].exp()
        found.append((-(p[k] / p.sum()).log(), k))
    return found


def plain_ohem(given: Any, threshold: float, least: float) -> Tensor:
    losses = sorted((loss for loss, _ in pixels(given)), key=lambda v: -float(v))
    hard = [v for v in losses if math.exp(-float(v)) <= threshold]
    kept = max(len(hard), math.ceil(least * len(losses)))
    return torch.stack(losses[:kept]).mean()


def plain_class_balanced(given: Any, beta: float) -> Tensor:
    found = pixels(given)
    counts = {k: sum(other == k for _, other in found) for _, k in found}
    weights = {k: (1 - beta) / (1 - beta**n) for k, n in counts.items()}
    total = sum(weights[k] for _, k in found)
    return sum((weights[k] * loss for loss, k in found), torch.zeros(())) / total


def plain_consistency(given: Any, distance: str, symmetric: bool) -> Tensor:
    first = given.logits if symmetric else given.logits.detach()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                p, q = first[b, :, y, x].exp(), given.second[b, :, y, x].exp()
                p, q = p / p.sum(), q / q.sum()
                if distance == "kl":
                    total = total + (p * (p / q).log()).sum()
                else:
                    total = total + ((p - q) ** 2).sum()
    return total / (2 * SIZE[0] * SIZE[1])


def plain_language(given: Any, template: str) -> Tensor:
    references = encode([template.format(name) for name in PARTS.classes], None)
    losses = []
    for b in range(2):
        for k in range(CLASSES):
            q = given.queries[b, k]
            cosines = torch.stack([(q @ r) / (q @ q).sqrt() / (r @ r).sqrt() for r in references])
            losses.append(cosines.exp().sum().log() - cosines[k])
    return torch.stack(losses).mean()


def plain_vision(given: Any, dense: bool) -> Tensor:
    own = (given.visual - given.frozen) ** 2
    return own[:, 1:].mean() if dense else own[:, 0].mean()


CASES: list[tuple[str, dict[str, Any], str, tuple[str, ...], Callable[[Any], Tensor]]] = [
    ("ohem", {"threshold": 0.3}, "ce", ("logits",), lambda g: plain_ohem(g, 0.3, 0.1)),
    (
        "ohem",
        {"threshold": 1e-9, "least": 0.25},
        "ce",
        ("logits",),
        lambda g: plain_ohem(g, 1e-9, 0.25),
    ),
    ("class_balanced", {"beta": 0.9}, "ce", ("logits",), lambda g: plain_class_balanced(g, 0.9)),
    ("class_balanced", {"beta": 0}, "ce", ("logits",), lambda g: plain_class_balanced(g, 0.0)),
    ("consistency", {}, "kl", ("logits", "second"), lambda g: plain_consistency(g, "kl", False)),
    (
        "consistency",
        {"symmetric": True},
        "kl",
        ("logits", "second"),
        lambda g: plain_consistency(g, "kl", True),
    ),
    (
        "consistency",
        {"distance": "mse", "symmetric": True},
        "mse",
        ("logits", "second"),
        lambda g: plain_consistency(g, "mse", True),
    ),
    (
        "language_regularization",
        {},
        "ce",
        ("queries",),
        lambda g: plain_language(g, "a clean origami of a {}"),
    ),
    (
        "vision_regularization",
        {},
        "global",
        ("visual", "frozen"),
        lambda g: plain_vision(g, False),
    ),
    (
        "vision_regularization",
        {"dense": True},
        "dense",
        ("visual", "frozen"),
        lambda g: plain_vision(g, True),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_values_and_gradients(case: Any) -> None:
    name, options, key, leaves, reference = case
    given: Any = inputs(*leaves)
    loss = build(name, **options).double()(with_log_probs(given) if "logits" in leaves else given)[
        key
    ]
    expected = reference(given)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, check_dtype=False)
    trained = [leaf for n in leaves if (leaf := getattr(given, n)).requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    wanted = torch.autograd.grad(expected.to(loss), trained, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)  # the first view of a consistency that is not
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_equal_weights_are_the_plain_cross_entropy() -> None:
    given = with_log_probs(inputs("logits"))
    assert given.log_probs is not None
    expected = torch.nn.functional.nll_loss(given.log_probs, given.labels, ignore_index=255)
    torch.testing.assert_close(build("class_balanced", beta=0)(given)["ce"], expected)
    torch.testing.assert_close(build("ohem", threshold=1)(given)["ce"], expected)


def test_rare_classes_weigh_more() -> None:
    given = with_log_probs(inputs("logits"))
    given.labels[:] = 0
    given.labels[0, 1, 1] = 1
    assert given.log_probs is not None
    losses = -given.log_probs.gather(1, given.labels.unsqueeze(1)).squeeze(1)
    rare = losses[0, 1, 1]
    common = (losses.sum() - rare) / (losses.numel() - 1)
    balanced = build("class_balanced", beta=1 - 1e-9)(given)["ce"]
    torch.testing.assert_close(balanced, (rare + common) / 2, rtol=1e-5, atol=0)


def test_the_second_view_differs_in_its_colors_alone() -> None:
    images = torch.rand(2, 3, 8, 9)
    loss = build("consistency")
    torch.manual_seed(1)
    seen = loss.view(images)
    assert seen.shape == images.shape and (seen - images).abs().mean() > 0.02
    assert seen.min() >= 0 and seen.max() <= 1
    torch.manual_seed(1)
    assert torch.equal(loss.view(images), seen)  # by torch's generator
    unchanged = build("consistency", brightness=0, contrast=0, saturation=0, hue=0)
    torch.testing.assert_close(unchanged.view(images), images)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("ohem", {"threshold": 0}, "greater than 0"),
        ("ohem", {"weight": 0}, "greater than 0"),
        ("class_balanced", {"beta": 1}, "less than 1"),
        ("consistency", {"distance": "l1"}, "distance"),
        ("consistency", {"hue": 0.7}, "less than or equal to 0.5"),
        ("language_regularization", {"template": "a photo"}, "write {} once, for the class"),
        ("language_regularization", {"template": "a {name}"}, "write {} once, for the class"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(name, **options)
