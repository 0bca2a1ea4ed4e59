"""How deep a parameter lies in its encoder, for layer-wise decay of the learning rate.

As in BEiT (Bao et al. 2022) and timm's `param_groups_layer_decay`: the layer of what comes before
the blocks is 0, that of block i is i + 1, and what comes after the blocks belongs to the last one.
"""

from __future__ import annotations

import re

from torch import nn

from mfuser.errors import MFuserError
from mfuser.interfaces import VisionBackbone, VisionLanguageBackbone

EMBEDDING = re.compile(
    r"embed(?!_proj)|_token|conv1|ln_pre|norm_pre|pre_layernorm|pre_layrnorm|patch"
)
"""Names of what comes before the blocks, wherever it is registered."""
FINAL = re.compile(r"(proj|head|text_projection|visual_projection|logit_scale|logit_bias)\b")
"""Names of what comes after them, likewise."""


def layer_depths(backbone: VisionBackbone) -> dict[str, int]:
    """Parameter -> the number of layers after its own, of its own tower: a text tower has layers
    of its own.

    Raises MFuserError for a backbone that does not say which modules its blocks are.
    """
    towers = stacks(backbone)
    order = {name: i for i, (name, _) in enumerate(backbone.named_parameters())}
    depths = {}
    for name in order:
        path, blocks = max(towers.items(), key=lambda tower: _nearness(name, tower[0]))
        inside = [i for i, block in enumerate(blocks) if name.startswith(f"{block}.")]
        outside = name.removeprefix(f"{_shared(name, path)}.")
        if inside:
            layer = inside[0] + 1
        elif FINAL.match(outside):
            layer = len(blocks)
        elif EMBEDDING.search(outside):
            layer = 0
        else:  # a norm, or a stage other than a block: by its place
            first = min(i for n, i in order.items() if n.startswith(f"{blocks[0]}."))
            layer = 0 if order[name] < first else len(blocks)
        depths[name] = len(blocks) - layer
    return depths


def stacks(backbone: VisionBackbone) -> dict[str, list[str]]:
    """The module that holds a tower's blocks -> the blocks' names, in order: of the vision tower,
    and of the text tower where there is one."""
    names = {module: name for name, module in backbone.named_modules()}
    try:
        blocks = backbone.block_modules()
    except MFuserError as error:
        raise MFuserError(f"layer_decay finds no layers: {error}") from error
    vision = [names[block] for block in blocks]
    found = {_common(vision): vision}
    if isinstance(backbone, VisionLanguageBackbone):
        own = next(iter(found))
        others = [
            (len(module), name)
            for name, module in backbone.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential)
            and len({type(child) for child in module}) == 1
            and not f"{name}.".startswith(f"{own}.")
            and not own.startswith(f"{name}.")
        ]
        if others:  # nothing else repeats as often as a tower's blocks
            count, name = max(others, key=lambda other: other[0])
            found[name] = [f"{name}.{i}" for i in range(count)]
    return found


def _common(blocks: list[str]) -> str:
    """The module around all blocks."""
    parts = [block.split(".")[:-1] for block in blocks]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _shared(one: str, other: str) -> str:
    """The path that two names share."""
    return _common([f"{one}.", f"{other}."])


def _nearness(name: str, path: str) -> tuple[int, int]:
    """Proximity of a tower's blocks to a parameter: the number of modules that contain both, then
    how close these are to the blocks."""
    shared = len(_shared(name, path).split(".")) if _shared(name, path) else 0
    return shared, shared - len(path.split("."))
