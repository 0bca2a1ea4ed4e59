"""What the tests of several backbone libraries share."""

from __future__ import annotations

import torch
from torch import nn

# Parameters that many models start at zero or one, or add to the tokens; all vectors are too.
NAMED = ("pos", "token", "cls", "query", "latent", "probe", "table", "rope")


def perturb(module: nn.Module) -> None:
    """So that a norm, bias, table, token or scale that is skipped shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1 or any(w in name for w in NAMED):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
