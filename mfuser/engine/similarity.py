"""How near every pixel of an image is to a text: cosines in the joint space of a model."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser.errors import MFuserError
from mfuser.interfaces import VisionLanguageBackbone
from mfuser.model.alignment import score_map
from mfuser.model.dgss import DGSSModel, batched, evaluating
from mfuser.model.sliding_window import blended

MOST_SLOTS = 128
"""Tokens of a text that are tried before it is called too long."""


def similarity(
    model: DGSSModel,
    images: Tensor,
    texts: Sequence[str],
    *,
    stride: int | tuple[int, int] | None = None,
    alone: bool = False,
) -> Tensor:
    """Cosines of patches and texts, brought to pixels: (B, len(texts), H, W) in [-1, 1].

    images: (B, 3, H, W) or (3, H, W), uint8 or RGB in [0, 1], from the image size up; larger ones
        are read through the sliding window, whose maps fade into each other.
    texts: class names or any words. A class of the model is answered by its own query, the one
        that training aligned with the patches (`ModelOutput.alignment`). Other texts join the
        classes on their way through prompt and text enhancer, and each gets a query like theirs.
    alone: the vision-language model for itself: no fusion, nothing of the vision model, plain
        texts without learned context and enhancer.

    Raises MFuserError for a model without text, and for a text that its text encoder cannot take.
    """
    vlm = _vlm(model)
    texts = _checked(texts)
    with evaluating(model):
        rows, chosen = _rows(model, vlm, texts, alone)

        def maps(windows: Tensor) -> Tensor:
            text = rows.expand(len(windows), -1, -1)  # (B, K, C)
            if alone:
                visual = model.encoder.visual_alone(windows)
            else:
                encoded = model.encoder(windows)
                assert encoded.visual is not None
                visual = encoded.visual
                text = model.enhancer(text, visual)
            near = score_map(visual[:, 1:], text[:, chosen], vlm.grid).float()
            size = (windows.shape[-2], windows.shape[-1])
            return F.interpolate(near, size, mode="bilinear", align_corners=False)

        return blended(maps, batched(images), model.spec.image_size, stride)


def check_texts(model: DGSSModel, texts: Sequence[str]) -> None:
    """Raises MFuserError as `similarity` would, before any image is read."""
    vlm = _vlm(model)
    with evaluating(model):
        _rows(model, vlm, _checked(texts), False)


def _vlm(model: DGSSModel) -> VisionLanguageBackbone:
    vlm = model.encoder.vlm
    if vlm is None:
        raise MFuserError("the model has no vision-language encoder, so nothing in it reads text")
    return vlm


def _checked(texts: Sequence[str]) -> list[str]:
    stripped = [" ".join(text.split()) for text in texts]
    if not stripped or not all(stripped):
        raise MFuserError("there is no text to compare the image with: give a class name or words")
    return stripped


def _rows(
    model: DGSSModel, vlm: VisionLanguageBackbone, texts: Sequence[str], alone: bool
) -> tuple[Tensor, list[int]]:
    """Text embeddings (K, C), and which of their rows are the texts'."""
    if alone:
        return _encoded(model, vlm, texts, None), list(range(len(texts)))
    known = list(model.classes)
    new = [text for text in dict.fromkeys(texts) if text not in known]
    rows = model.text()
    if new:
        context = model.prompt.contexts if model.prompt else None
        rows = torch.cat([rows, _encoded(model, vlm, new, context)])
    return rows, [[*known, *new].index(text) for text in texts]


def _encoded(
    model: DGSSModel, vlm: VisionLanguageBackbone, texts: Sequence[str], context: Tensor | None
) -> Tensor:
    """In as many slots as the classes have, or in more where a text needs them."""
    device, refused = next(model.parameters()).device, None
    for slots in range(model.spec.prompt.slots, MOST_SLOTS + 1):
        try:
            ids = vlm.tokenize(list(texts), slots)
        except MFuserError as error:
            refused = error
            continue
        try:
            rows: Tensor = vlm.within(vlm.encode_text, ids.to(device), context)
            return rows
        except MFuserError as error:  # more slots would have less room still
            refused = error
            break
    quoted = ", ".join(f"'{shorten(text, 60)}'" for text in texts)
    raise MFuserError(f"the text encoder cannot take {quoted}: {refused}")
