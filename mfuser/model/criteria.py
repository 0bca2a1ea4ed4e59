"""The losses beside the decoder's own: what they are given, and what they add."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mfuser.interfaces import Decoder, DecoderOutput, VisionLanguageBackbone
from mfuser.losses import Loss, LossInputs
from mfuser.model.sliding_window import at_least_float32
from mfuser.plugins.contracts import expect, scalars

if TYPE_CHECKING:
    from mfuser.model.dgss import DGSSModel, ModelOutput

LEAST = 1e-6
"""Added to shares before their logarithm: no gradient of a share near zero is without bounds."""


class Before(nn.Module):
    """A vision-language model as it was before training, always frozen and in evaluation mode."""

    def __init__(self, vlm: VisionLanguageBackbone) -> None:
        super().__init__()
        self.vlm = vlm.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Before:
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return alone(self.vlm, images)


@torch.no_grad()
def alone(vlm: VisionLanguageBackbone, images: Tensor) -> Tensor:
    """Images (B, 3, H, W), RGB in [0, 1] -> global and dense embeddings (B, 1 + T, C), without any
    other encoder."""
    stream = vlm.embed(vlm.normalize(images))
    tokens, state = stream.tokens, stream.state
    for i in range(vlm.depth):
        tokens = vlm.within(vlm.block, i, tokens, state)
    finished = vlm.within(vlm.finish, tokens, state)
    return torch.cat(vlm.within(vlm.project, finished, state), dim=1)


def log_probs(decoder: Decoder, output: DecoderOutput, classes: int, size: torch.Size) -> Tensor:
    """Log-probabilities of the classes (B, K, *size), of logits and of shares alike."""
    scores = decoder.semantic_logits(output, (size[0], size[1]))
    shape = (scores.shape[0], classes, *size)
    scores = at_least_float32(expect(decoder, "semantic_logits()'s result", scores, shape))
    if decoder.scores == "logits":
        return scores.log_softmax(1)
    scores = scores + LEAST
    return scores.log() - scores.sum(1, keepdim=True).log()


def criteria_losses(
    model: DGSSModel, output: ModelOutput, labels: Tensor, images: Tensor
) -> dict[str, Tensor]:
    """COMPONENT.NAME -> weighted loss of every criterion of the model."""
    inputs = _Inputs(model, labels, output)
    losses: dict[str, Tensor] = {}
    for spec in model.spec.losses:
        criterion = cast(Loss, model.criteria[spec.name])
        given = inputs.given(spec.needs, output, images)
        if "view" in spec.needs:
            seen = criterion.view(images)
            expect(criterion, "view()'s result", seen, tuple(images.shape))
            given.view = inputs.given(spec.needs, model.predict(seen, output.text), seen)
        found = scalars(criterion, criterion(given), "forward()")
        losses |= {f"{spec.name}.{name}": spec.weight * loss for name, loss in found.items()}
    return losses


class _Inputs:
    """The inputs of the losses; those that several of them read are computed once."""

    def __init__(self, model: DGSSModel, labels: Tensor, output: ModelOutput) -> None:
        self.model, self.labels, self.output = model, labels, output
        self._computed: dict[str, Tensor] = {}

    def given(self, needs: tuple[str, ...], output: ModelOutput, images: Tensor) -> LossInputs:
        model = self.model
        given = LossInputs(images, self.labels, output.decoder, output.pyramid)
        if "text" in needs:
            given.queries, given.visual = output.queries, output.visual
            given.alignment = output.alignment
        if "log_probs" in needs:
            given.log_probs = self._once(
                "log_probs",
                output,
                lambda: log_probs(
                    model.decoder, output.decoder, len(model.classes), self.labels.shape[-2:]
                ),
            )
        if "frozen" in needs:
            given.frozen = self._once("frozen", output, lambda: self._before(images))
        return given

    def _once(self, name: str, output: ModelOutput, compute: Callable[[], Tensor]) -> Tensor:
        if output is not self.output:  # of another view
            return compute()
        if name not in self._computed:
            self._computed[name] = compute()
        return self._computed[name]

    def _before(self, images: Tensor) -> Tensor:
        model = self.model
        if model.before is not None:
            found: Tensor = model.before(images)
            return found
        vlm = model.encoder.vlm
        assert vlm is not None
        training = model.training
        try:
            return alone(vlm.eval(), images)
        finally:
            vlm.train(training)
