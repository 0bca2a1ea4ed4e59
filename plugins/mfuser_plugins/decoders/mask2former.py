"""Mask2Former as published: learned queries and Hungarian matching."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from mfuser import DecoderOutput, DecoderSpec, MFuserError, hookimpl
from mfuser_plugins.decoders._mask_decoder import MaskDecoder, MaskDecoderSpec, deep_names
from mfuser_plugins.decoders._mask_losses import ClassMasks, MaskLosses, class_masks, sample


class Mask2Former(MaskDecoder):
    """Learned queries, each assigned to a ground-truth mask or to none by Hungarian matching.

    Cheng et al., CVPR 2022 (arXiv 2112.01527); Rein's decoder. It takes no text.

    Raises MFuserError for fewer queries than classes: every class of a crop needs one.
    """

    def __init__(self, spec: Mask2FormerSpec, channels: tuple[int, ...], num_classes: int) -> None:
        queries = spec.queries
        if queries < num_classes:
            raise MFuserError(
                f"mask2former: {queries} queries cannot answer for {num_classes} classes, which "
                f"may all be in one crop; set queries to {num_classes} or more"
            )
        super().__init__(spec, channels, num_classes, None, queries)
        self.query_feat: nn.Embedding | nn.Linear = nn.Embedding(queries, spec.width)
        self.learned_queries = (queries, spec.width)

    def take_queries(self) -> None:
        """Contents and positions of the queries become linear maps of those that are given."""
        assert self.learned_queries is not None
        width = self.learned_queries[1]
        self.query_feat, self.query_embed = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self,
        pyramid: list[Tensor],
        queries: Tensor | None = None,
        given: Tensor | None = None,
    ) -> DecoderOutput:
        """Class queries are ignored. given (Q, D): the object queries, after `take_queries`."""
        if given is None:
            contents, positions = self.query_feat.weight, self.query_embed.weight
        else:
            contents, positions = self.query_feat(given), self.query_embed(given)
        return self.decode(contents.repeat(len(pyramid[0]), 1, 1), pyramid, positions=positions)

    def loss(self, output: DecoderOutput, labels: Tensor) -> dict[str, Tensor]:
        """Weighted losses: `loss_*` of the last prediction, `d<i>.loss_*` of the i-th."""
        there = class_masks(labels, self.num_classes)
        predictions = list(zip(output.masks, output.classes, strict=True))
        each = matched_losses(predictions, there, self.losses)
        return deep_names(self.losses.in_whole_batch(each, there, output.classes[-1].shape[1]))


Prediction = tuple[Tensor, Tensor]
"""masks (B, Q, h, w) and classes (B, Q, K + 1), logits."""


def matched_losses(
    predictions: Sequence[Prediction], there: ClassMasks, losses: MaskLosses
) -> list[dict[str, Tensor]]:
    """The weighted losses of each prediction, its queries matched with the masks.

    All points are drawn before anything is matched, in the order of one prediction after the other.
    """
    counts = there.present.sum(1).tolist()
    points, numbers = [], []
    for masks, _ in predictions:
        like = masks.new_empty(0, dtype=torch.promote_types(masks.dtype, torch.float32))
        points.append([like.new_empty(1, losses.num_points, 2).uniform_() for n in counts if n])
        numbers.append(losses.numbers(sum(counts), like) if any(counts) else None)
    matches = match(predictions, there, counts, points, losses)
    return [
        losses.matched(masks[there.image, query], classes, labels, there.truth, drawn=drawn)
        for (masks, classes), (query, labels), drawn in zip(
            predictions, matches, numbers, strict=True
        )
    ]


@torch.no_grad()
def match(
    predictions: Sequence[Prediction],
    there: ClassMasks,
    counts: Sequence[int],
    points: Sequence[Sequence[Tensor]],
    weights: MaskLosses,
) -> list[tuple[Tensor, Tensor]]:
    """The cheapest one-to-one matching of each prediction's queries to masks, image by image.

    counts: masks of each image. points: for each prediction (1, P, 2) for each image with a mask.
    Returns for each prediction the query of each of the n masks, and labels (B, Q), K being "no
    object". The cost is the loss of each pair, on the points of the image, with the class loss
    replaced by minus the probability (arXiv 2112.01527, section 3.3).

    The CPU matches: all costs go there together, and all queries back.
    """
    costs = [
        pair_costs(
            at(masks[b].to(at_points.dtype), at_points),
            at(truth[:, 0].to(at_points.dtype), at_points),
            classes[b].softmax(-1)[:, ids].to(at_points.dtype),
            weights,
        )
        for (masks, classes), mine in zip(predictions, points, strict=True)
        for (b, truth, ids), at_points in zip(_by_image(there, counts), mine, strict=True)
    ]
    queries = torch.from_numpy(_assigned(costs)).to(there.image.device, non_blocking=True)
    found = queries.split([sum(counts)] * len(predictions))
    labels = [torch.full(c.shape[:2], c.shape[-1] - 1, device=c.device) for _, c in predictions]
    for query, labeled in zip(found, labels, strict=True):
        labeled[there.image, query] = there.class_id
    return list(zip(found, labels, strict=True))


def _by_image(there: ClassMasks, counts: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each image with a mask: its place, masks (n_b, 1, H, W) and classes (n_b)."""
    sizes = list(counts)
    parts = zip(there.truth.split(sizes), there.class_id.split(sizes), strict=True)
    for b, (truth, ids) in enumerate(parts):
        if len(ids):
            yield b, truth, ids


def at(maps: Tensor, points: Tensor) -> Tensor:
    """maps (n, h, w) at the same points (1, P, 2) -> (n, P)."""
    return sample(maps.unsqueeze(1), points.expand(len(maps), -1, -1))


def pair_costs(logits: Tensor, targets: Tensor, probability: Tensor, weights: MaskLosses) -> Tensor:
    """logits (Q, P), targets (n, P), probability (Q, n) of each mask's class -> costs (Q, n)."""
    inside, outside = F.softplus(-logits), F.softplus(logits)
    entropy = (inside @ targets.T + outside @ (1 - targets).T) / logits.shape[1]
    p = logits.sigmoid()
    sizes = p.sum(1, keepdim=True) + targets.sum(1)
    dice = 1 - (2 * p @ targets.T + 1) / (sizes + 1)
    return (
        weights.mask_weight * entropy
        + weights.dice_weight * dice
        - weights.cls_weight * probability
    )


def _assigned(costs: Sequence[Tensor]) -> np.ndarray:
    """Costs (Q, n_i) -> the queries of all their columns, one after the other."""
    if not costs:
        return np.empty(0, np.int64)
    flat = torch.cat([cost.flatten() for cost in costs]).cpu().double()
    parts = flat.split([cost.numel() for cost in costs])
    return np.concatenate(
        [assign(part.view(cost.shape).numpy()) for part, cost in zip(parts, costs, strict=True)]
    )


def assign(costs: np.ndarray) -> np.ndarray:
    """costs (Q, n), n <= Q -> the query of each column, all different, of the least sum."""
    from scipy.optimize import linear_sum_assignment

    # A diverged model is reported by its loss, not by the solver.
    rows, columns = linear_sum_assignment(np.nan_to_num(costs))
    queries = np.empty(costs.shape[1], dtype=np.int64)
    queries[columns] = rows
    return queries


class Mask2FormerSpec(MaskDecoderSpec, name="mask2former"):
    """A Mask2Former with learned queries and Hungarian matching. Takes no text.

    queries: at least as many as there are classes.
    width, heads: of both transformers; points: samples per head and level of the deformable
        attention.
    pixel_layers, pixel_ffn: of the pixel decoder; layers, ffn: of the query decoder.
    norm_groups: of the group norms; they divide the width.
    init: how the pixel decoder's convolutions start: as PyTorch makes them, or "released", as in
        text_mask2former.
    num_points, oversample, importance: masks are compared at this many points each; of
        oversample times as many, the most uncertain are kept as this share of them.
    cls_weight, mask_weight, dice_weight: of the three losses, and in the matching; no_object: of
        a query that answers for no class.
    """

    tiny: ClassVar[Mapping[str, Any]] = {"queries": 20, **MaskDecoderSpec.tiny}

    queries: PositiveInt = 100

    def build(
        self, channels: tuple[int, ...], num_classes: int, text_dim: int | None
    ) -> Mask2Former:
        return Mask2Former(self, channels, num_classes)


@hookimpl
def mfuser_components() -> list[type[DecoderSpec]]:
    return [Mask2FormerSpec]
