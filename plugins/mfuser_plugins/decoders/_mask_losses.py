"""Losses of a set of masks, with Hungarian matching (Mask2Former) or fixed matching (tqdm).

Mask2Former's losses on sampled points (arXiv 2112.01527, section 3.3). Letters: n class masks
present in the batch, image by image, classes ascending; P points.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from mfuser import DecoderSpec, whole_batch


class ClassMasks(NamedTuple):
    """The classes in the labels of a batch. present: (B, K), bool. truth: their masks (n, 1, H, W),
    float32. image, class_id: (n), of each mask."""

    present: Tensor
    truth: Tensor
    image: Tensor
    class_id: Tensor


@dataclass(frozen=True)
class MaskLosses:
    """The losses of one prediction, weighted.

    num_points: P, the points sampled per mask and prediction.
    oversample, importance: P * oversample points are drawn, and the P * importance most uncertain
        of them are kept; the remaining points are drawn uniformly (PointRend, arXiv 1912.08193).
    no_object: class weight of "no object".
    """

    num_points: int = 12_544
    oversample: float = 3.0
    importance: float = 0.75
    cls_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1

    def __call__(
        self,
        masks: Tensor,
        classes: Tensor,
        there: ClassMasks,
        points: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Named, weighted scalars.

        masks (B, K, h, w) and classes (B, K, K + 1) logits; there: from `class_masks`; points
        (n, P, 2) to use instead of drawn ones.
        """
        chosen = masks[there.image, there.class_id]
        return self.matched(chosen, classes, fixed_labels(there.present), there.truth, points)

    def matched(
        self,
        chosen: Tensor,
        classes: Tensor,
        labels: Tensor,
        truth: Tensor,
        points: Tensor | None = None,
        drawn: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The same for any matching.

        chosen (n, h, w): the logits of the query that answers for each mask of truth
        (n, 1, H, W); classes (B, Q, K + 1) logits and the queries' labels (B, Q), K "no object".
        drawn: what `numbers` returned, where the generator had to be asked earlier.
        """
        loss_cls = labeled_loss(classes, labels, self.no_object)
        # At least float32, for the coordinates and for sums over thousands of points.
        chosen = chosen.unsqueeze(1)  # (n, 1, h, w)
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        if len(chosen) == 0:
            nothing = chosen.sum() * 0
            return {
                "loss_cls": self.cls_weight * loss_cls,
                "loss_mask": nothing,
                "loss_dice": nothing,
            }
        if points is None:
            points = self.draw(chosen.detach(), drawn)
        logits = sample(chosen, points)  # (n, P)
        targets = sample(truth.to(chosen.dtype), points)
        return {
            "loss_cls": self.cls_weight * loss_cls,
            "loss_mask": self.mask_weight * F.binary_cross_entropy_with_logits(logits, targets),
            "loss_dice": self.dice_weight * dice_loss(logits, targets),
        }

    def in_whole_batch(
        self, each: list[dict[str, Tensor]], there: ClassMasks, queries: int
    ) -> list[dict[str, Tensor]]:
        """The losses of the predictions, which are means over this process's masks, as means over
        the masks of all processes (as released: num_masks is summed over them).

        queries: Q. Every mask has one query that answers for it.
        """
        masks = there.present.sum()
        weights = masks + (len(there.present) * queries - masks) * self.no_object
        share = whole_batch.share(torch.stack([masks.to(weights.dtype), weights]))
        if isinstance(share, float):  # of one process
            return each
        shares = {"loss_cls": share[1], "loss_mask": share[0], "loss_dice": share[0]}
        return [{name: loss * shares[name] for name, loss in one.items()} for one in each]

    def draw(self, masks: Tensor, drawn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Sampled points: masks (n, 1, h, w), logits -> (n, P, 2), from the global generator.

        drawn: numbers of the generator to use instead.
        """
        candidates, anywhere = drawn or self.numbers(len(masks), masks)
        important = self.num_points - anywhere.shape[1]
        return torch.cat([most_uncertain(masks, candidates, important), anywhere], 1)

    def numbers(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The random numbers of `draw` for n masks: candidates and points anywhere, of the
        dtype and on the device of `like`."""
        important = int(self.importance * self.num_points)
        candidates = like.new_empty(n, int(self.oversample * self.num_points), 2).uniform_()
        anywhere = like.new_empty(n, self.num_points - important, 2).uniform_()
        return candidates, anywhere


class MaskLossSpec(DecoderSpec):
    """The options of a decoder that has these losses (documented where they are named)."""

    num_points: PositiveInt = MaskLosses.num_points
    oversample: float = Field(default=MaskLosses.oversample, ge=1)
    importance: float = Field(default=MaskLosses.importance, ge=0, le=1)
    cls_weight: NonNegativeFloat = MaskLosses.cls_weight
    mask_weight: NonNegativeFloat = MaskLosses.mask_weight
    dice_weight: NonNegativeFloat = MaskLosses.dice_weight
    no_object: NonNegativeFloat = MaskLosses.no_object

    def losses(self) -> MaskLosses:
        return MaskLosses(**{f.name: getattr(self, f.name) for f in fields(MaskLosses)})


def class_masks(labels: Tensor, num_classes: int) -> ClassMasks:
    """The classes present in each image, and their masks.

    labels (B, H, W). Ignored pixels are outside every mask, i.e. negatives of each.
    """
    one_hot = labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    present = one_hot.flatten(2).any(-1)
    # The only number that a GPU is waited for: how many masks there are. Indexing by places from
    # here on asks for nothing, by booleans it would ask again each time.
    image, class_id = present.nonzero(as_tuple=True)
    return ClassMasks(present, one_hot[image, class_id].unsqueeze(1).float(), image, class_id)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values: maps (n, 1, h, w), points (n, P, 2) as (x, y) in [0, 1] -> (n, P)."""
    grid = (2 * points - 1).unsqueeze(2)
    return F.grid_sample(maps, grid, align_corners=False)[:, 0, :, 0]


def most_uncertain(masks: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The `count` candidates whose logit is nearest zero, nearest first.

    masks (n, 1, h, w), candidates (n, M, 2) -> (n, count, 2).
    """
    uncertainty = -sample(masks, candidates).abs()
    chosen = uncertainty.topk(count, dim=1).indices
    return candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))


def fixed_labels(present: Tensor) -> Tensor:
    """present (B, K), bool -> labels (B, K): query k is class k where it is there, else K."""
    k = present.shape[1]
    return torch.where(present, torch.arange(k, device=present.device), k)


def labeled_loss(classes: Tensor, labels: Tensor, no_object: float) -> Tensor:
    """Weighted mean cross-entropy: classes (B, Q, K + 1), labels (B, Q), K being "no object"."""
    weight = torch.ones(classes.shape[-1], device=classes.device, dtype=classes.dtype)
    weight[-1].fill_(no_object)  # an assignment copies the number to the device
    return F.cross_entropy(classes.flatten(0, 1), labels.flatten(), weight)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the soft Dice coefficient with 1 added to numerator and denominator, mean over n.

    logits, targets: (n, P).
    """
    p = logits.sigmoid()
    overlap = 2 * (p * targets).sum(-1)
    return (1 - (overlap + 1) / (p.sum(-1) + targets.sum(-1) + 1)).mean()
