from __future__ import annotations

import math

import torch
from golden import close, golden

from mfuser_plugins.decoders._mask_losses import (
    ClassMasks,
    MaskLosses,
    class_masks,
    dice_loss,
    fixed_labels,
    labeled_loss,
    most_uncertain,
    sample,
)


def test_equals_the_released_losses() -> None:
    file = golden("losses")
    there = class_masks(file["gt_semantic_seg"].long(), 19)
    masks = torch.cat([file["gt_masks0"], file["gt_masks1"]]).float()
    assert torch.equal(there.truth[:, 0], masks)
    assert torch.equal(there.present, file["mask_weights"] > 0)
    gradients = {
        ("loss_cls",): ("grad_cls_only", None),
        ("loss_mask",): (None, "grad_mask_from_mask"),
        ("loss_dice",): (None, "grad_mask_from_dice"),
        ("loss_cls", "loss_mask", "loss_dice"): ("grad_cls_logits", "grad_mask_logits"),
    }
    for names, (of_classes, of_masks) in gradients.items():
        classes = file["cls_logits"].clone().requires_grad_()
        masks = file["mask_logits"].clone().requires_grad_()
        losses = MaskLosses()(masks, classes, there, file["point_coords"])
        for name in names:
            assert close(losses[name], file[name].squeeze())
        torch.stack([losses[name] for name in names]).sum().backward()
        if of_classes:
            assert classes.grad is not None and close(classes.grad, file[of_classes])
        if of_masks:
            assert masks.grad is not None and close(masks.grad, file[of_masks])


def test_equals_the_released_sampler() -> None:
    file = golden("losses")
    masks = file["sampler.mask_pred"].unsqueeze(1)
    points = torch.cat(
        [most_uncertain(masks, file["sampler.u_candidates"], 150), file["sampler.u_random"]], 1
    )
    assert torch.equal(points, file["sampler.coords"])
    preds = sample(file["mask_logits"][file["mask_weights"] > 0].unsqueeze(1), points)
    assert close(preds, file["point_preds"])


def test_class_masks() -> None:
    labels = torch.tensor([[[2, 2, 255]], [[0, 2, 1]]])
    present, masks, image, class_id = class_masks(labels, 4)
    assert present.tolist() == [[False, False, True, False], [True, True, True, False]]
    assert masks[:, 0, 0].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert image.tolist() == [0, 1, 1, 1] and class_id.tolist() == [2, 0, 1, 2]


def test_sample_by_hand() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]])
    points = torch.tensor([[[0.25, 0.25], [0.5, 0.25], [0.5, 0.5], [0.0, 0.25]]])
    # At a pixel's center, between two, among four, and at the edge, where half of it is outside.
    assert sample(maps, points).tolist() == [[1.0, 1.5, 2.75, 0.5]]


def test_losses_by_hand() -> None:
    # Logits one by one; class 0 of 2 is there in image 0, none in image 1.
    classes = torch.tensor([[[2.0, 0, 1], [0, 1, 3]], [[1, 1, 1], [0, 0, 4]]]).double()
    present = torch.tensor([[True, False], [False, False]])

    def entropy(logits: list[float], label: int) -> float:
        return math.log(sum(math.exp(x) for x in logits)) - logits[label]

    want = entropy([2, 0, 1], 0) + 0.1 * (
        entropy([0, 1, 3], 2) + entropy([1, 1, 1], 2) + entropy([0, 0, 4], 2)
    )
    assert math.isclose(labeled_loss(classes, fixed_labels(present), 0.1).item(), want / 1.3)

    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]]).double()
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.25]]).double()

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    first = 1 - (2 * 0.5 + 1) / (0.5 + sigmoid(2) + 1 + 1)
    second = 1 - (2 * 0.25 * sigmoid(3) + 1) / (sigmoid(-1) + sigmoid(3) + 0.25 + 1)
    assert math.isclose(dice_loss(logits, targets).item(), (first + second) / 2)

    # Four pixels, compared at their centers; the truth is the left column.
    masks = torch.tensor([[[[1.0, -2.0], [0.5, 3.0]], [[9.0, 9.0], [9.0, 9.0]]]]).double()
    truth = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]]).double()
    first_one = torch.zeros(1, dtype=torch.long)
    there = ClassMasks(present[:1], truth, first_one, first_one)
    losses = MaskLosses(cls_weight=3, mask_weight=7)(masks, classes[:1], there, points)
    by_hand = -sum(math.log(sigmoid(x)) for x in (1.0, 2.0, 0.5, -3.0)) / 4
    assert math.isclose(losses["loss_mask"].item(), 7 * by_hand)
    want = (entropy([2, 0, 1], 0) + 0.1 * entropy([0, 1, 3], 2)) / 1.1
    assert math.isclose(losses["loss_cls"].item(), 3 * want)


def test_points_gather_at_the_border() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-8, 8, 64).expand(1, 1, 64, 64)  # zero at x = 0.5
    losses = MaskLosses(num_points=400)
    points = losses.draw(ramp)
    assert points.shape == (1, 400, 2) and points.min() >= 0 and points.max() <= 1
    distance = (points[0, :, 0] - 0.5).abs()
    # Of 1,200 uniform points the 300 nearest lie within 0.125 of the border, 0.0625 on average;
    # some of the upper and lower edge, where logits fade, come from farther. The rest: 0.25.
    assert distance[:300].mean() < 0.08 and distance[300:].mean() > 0.2
    assert 0.4 < points[0, 300:].mean() < 0.6 and len(points[0].unique(dim=0)) == 400
    torch.manual_seed(0)
    assert torch.equal(points, losses.draw(ramp))


def test_nothing_present() -> None:
    masks = torch.randn(1, 3, 4, 4, requires_grad=True)
    there = class_masks(torch.full((1, 16, 16), 255), 3)
    losses = MaskLosses(num_points=8)(masks, torch.zeros(1, 3, 4), there)
    torch.stack(list(losses.values())).sum().backward()
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    assert masks.grad is not None and not masks.grad.any()
    assert math.isclose(losses["loss_cls"].item(), 2 * math.log(4), rel_tol=1e-6)
