"""tqdm's language regularization: the class texts stay near what a fixed prompt says.

Pak et al., "Textual Query-Driven Mask Transformer for Domain Generalized Segmentation", ECCV 2024;
read off its code (MIT, ByeongHyunPak/tqdm, 75168af), where the fixed prompt is "a clean origami of
a CLASS". Its vision-language regularization is the pixel-text alignment that every pairing has
(the key `alignment`), its vision regularization the component `vision_regularization`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, field_validator
from torch import Tensor

from mfuser import Loss, LossInputs, LossParts, LossSpec, Need, hookimpl


class LanguageRegularization(Loss):
    """Each class query is to be nearer to its own reference text than to those of others:
    cross-entropy of the cosine similarities, without a temperature.

    references: (K, C), as the text tower gave them before any training.
    """

    def __init__(self, references: Tensor) -> None:
        super().__init__()
        self.references: Tensor
        # Not saved: they follow from the tower's own weights, as the frozen encoders do.
        self.register_buffer("references", F.normalize(references, dim=-1), persistent=False)

    def forward(self, given: LossInputs) -> dict[str, Tensor]:
        assert given.queries is not None, "it is declared in `needs`"
        similarity = F.normalize(given.queries, dim=-1) @ self.references.T  # (B, K, K)
        target = torch.arange(len(self.references), device=similarity.device)
        own = target.expand(len(similarity), -1)
        return {"ce": F.cross_entropy(similarity.transpose(1, 2), own)}


class LanguageRegularizationSpec(LossSpec, name="language_regularization"):
    """The class queries stay near the texts of a fixed prompt (tqdm).

    template: of the prompt, with {} for the name of the class.
    slots: tokens it may take, start and end included; None: those of the pairing's prompt, context
        and class name together.
    """

    needs: ClassVar[tuple[Need, ...]] = ("text",)
    tiny: ClassVar[Mapping[str, Any]] = {"template": "a {}"}

    template: str = "a clean origami of a {}"
    slots: PositiveInt | None = None

    @field_validator("template")
    @classmethod
    def _names_the_class(cls, template: str) -> str:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise ValueError(f"template = {template!r}: write {{}} once, for the class")
        return template

    def build(self, parts: LossParts) -> LanguageRegularization:
        """Raises MFuserError where a text needs more slots, saying how many."""
        texts = [self.template.format(name) for name in parts.classes]
        return LanguageRegularization(parts.encode(texts, self.slots))


@hookimpl
def mfuser_components() -> list[type[LossSpec]]:
    return [LanguageRegularizationSpec]
