"""Which parameters AdamW moves, and how."""

from __future__ import annotations

from torch import nn

from mfuser.config.recipe import RecipeSpec
from mfuser.errors import MFuserError
from mfuser.model.dgss import DGSSModel


def parameter_groups(model: DGSSModel, recipe: RecipeSpec) -> list[dict[str, object]]:
    """AdamW's groups: with and without decay, encoders at their own rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    encoders = tuple(f"encoder.{role}." for role in model.encoder.backbones)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_backbone = name.startswith(encoders)
            decayed = not any(part in name for part in recipe.no_decay)
            groups.setdefault((in_backbone, decayed), []).append(parameter)
    if not groups:
        raise MFuserError("nothing in this pairing trains")
    return [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if decayed else 0.0,
            "factor": recipe.backbone_lr if in_backbone else 1.0,
        }
        for (in_backbone, decayed), parameters in groups.items()
    ]
