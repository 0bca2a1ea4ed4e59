"""Helpers shared by the tests of several backbone libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Parameters that many models start at zero or one, or add to the tokens; all vectors are too.
NAMED = ("pos", "token", "cls", "query", "latent", "probe", "table", "rope")


def perturb(module: nn.Module) -> None:
    """So that a norm, bias, table, token or scale that is skipped shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1 or any(w in name for w in NAMED):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def step(backbone: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The tokens after each block, and the finished ones."""
    stream = backbone.embed(images)
    tokens, found = stream.tokens, []
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, stream.state)
        found.append(tokens)
    return found, backbone.finish(tokens, stream.state)


def check_texts(backbone: Any) -> Tensor:
    """Asserts that text embeddings, with and without learned context, are those of the library's
    own forward; returns the token ids of two names."""
    model, ids = backbone.model, backbone.tokenize(["road", "traffic light"], 9)
    assert torch.equal(backbone.encode_text(ids), model.get_text_features(ids).pooler_output)
    extra = torch.tensor([500, 600, 700])
    full = torch.cat([ids[:, :1], extra.expand(2, -1), ids[:, 1:]], dim=1)
    context = model.text_model.embeddings.token_embedding(extra)
    wanted = model.get_text_features(full).pooler_output
    assert torch.equal(backbone.encode_text(ids, context), wanted)
    return ids
