"""Mask2Former as published: learned queries and Hungarian matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from mfuser import DecoderOutput, DecoderSpec, MFuserError, hookimpl
from mfuser_plugins.decoders._mask_decoder import MaskDecoder, MaskDecoderSpec, deep_names
from mfuser_plugins.decoders._mask_losses import MaskLosses, class_masks, sample


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
        present, truth = class_masks(labels, self.num_classes)
        each = []
        for masks, classes in zip(output.masks, output.classes, strict=True):
            image, query, labeled = match(masks, classes, present, truth, self.losses)
            each.append(self.losses.matched(masks[image, query], classes, labeled, truth))
        return deep_names(each)


@torch.no_grad()
def match(
    masks: Tensor, classes: Tensor, present: Tensor, truth: Tensor, weights: MaskLosses
) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest one-to-one matching of queries to masks, image by image.

    masks (B, Q, h, w) and classes (B, Q, K + 1) logits; present (B, K) and truth (n, 1, H, W)
    from `class_masks` -> for each of the n masks its image and query, (n) each; labels (B, Q),
    K being "no object". The cost is the loss of each pair, on points drawn once for an image, with
    the class loss replaced by minus the probability (arXiv 2112.01527, section 3.3).
    """
    image, class_id = present.nonzero(as_tuple=True)
    queries = torch.zeros_like(image)
    labels = torch.full(classes.shape[:2], classes.shape[-1] - 1, device=classes.device)
    dtype = torch.promote_types(masks.dtype, torch.float32)
    for b in image.unique().tolist():
        mine = image == b
        points = masks.new_empty(1, weights.num_points, 2, dtype=dtype).uniform_()
        costs = pair_costs(
            at(masks[b].to(dtype), points),
            at(truth[mine, 0].to(dtype), points),
            classes[b].softmax(-1)[:, class_id[mine]].to(dtype),
            weights,
        )
        queries[mine] = torch.from_numpy(assign(costs.cpu().double().numpy())).to(queries)
        labels[b, queries[mine]] = class_id[mine]
    return image, queries, labels


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
