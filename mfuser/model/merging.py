"""Updates of weights, folded into the weights: for inference."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

M = TypeVar("M", bound=nn.Module)


def merge_tuning(model: M) -> M:
    """Fold every parametrization (LoRA and its kin) into the weight that it makes, in place.

    The outputs stay the same; what could be trained or saved of the updates is lost, and weights
    that were frozen stay so. A tuning that adds modules of its own (Rein) is not a parametrization
    and stays as it is.
    """
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
        for name, chain in list(parametrizations.items()):
            trains = [p.requires_grad for n, p in chain.named_parameters() if "original" in n]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            getattr(module, name).requires_grad_(any(trains))
    return model
