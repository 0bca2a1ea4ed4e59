"""Which parameters AdamW moves, at which rate, and how far it decays them.

A table such as `lr_scale = { decoder = 10, "encoder.vfm.model.blocks.*.attn" = 0.1 }` names
components (`COMPONENTS`) and patterns. A pattern fits a parameter whose name it matches, or a
module above it; "*" also matches dots. Where several entries fit, the most specific counts: a
pattern before a component, of two patterns the one with more characters beside its wildcards, and
of two components the inner one (tuning is inside vfm, and vfm_2 too).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from mfuser.config.recipe import RecipeSpec
from mfuser.engine.layers import layer_depths
from mfuser.errors import MFuserError, listed, suggest
from mfuser.model.dgss import DGSSModel

PARTS = {"adapters": "fusion", "project_vfm": "merge", "criteria": "losses"}
"""Parts of the model, or of the encoder beside its backbones, that are not called by the key
of a pairing that makes them."""
T = TypeVar("T", float, tuple[int, int])
Ramp = tuple[int, int]
"""Steps between which a rate rises."""
COMPONENTS = (
    *("vfm", "vlm", "tuning", "fusion", "merge"),
    *("pyramid", "enhancer", "decoder", "prompt", "losses"),
)
"""Words that stand for all parameters of a component, by its key in a pairing; vfm_1, … too."""


@dataclass(frozen=True)
class Trained:
    """A trained parameter. words: of COMPONENTS, the inner ones last. depth: blocks of its encoder
    that come after it (`layer_depths`); 0 outside encoders."""

    name: str
    parameter: nn.Parameter
    words: tuple[str, ...]
    depth: int = 0

    @property
    def in_backbone(self) -> bool:
        return self.words[0] in ("vfm", "vlm")

    def places(self) -> Iterator[str]:
        """Its name, and the names of the modules that it is in."""
        name = self.name
        while name:
            yield name
            name = name.rpartition(".")[0]


def parameter_groups(model: DGSSModel, recipe: RecipeSpec) -> list[dict[str, object]]:
    """AdamW's groups: parameters that share their factor on the rate, its ramp, and their decay.

    factor: on the rate. ramp: of the recipe's `lr_ramp`, if any. decay: the weight decay before its
    schedule.
    Raises MFuserError where nothing trains, and for an entry of a table that fits nothing.
    """
    parameters = trained(model, layers=recipe.layer_decay is not None)
    if not parameters:
        raise MFuserError("nothing in this pairing trains")
    scales = _chosen("lr_scale", recipe.lr_scale, parameters)
    decays = _chosen("weight_decay", recipe.decays, parameters)
    ramps = _chosen("lr_ramp", recipe.lr_ramp, parameters)
    layer_decay = recipe.layer_decay
    if layer_decay is not None and not any(p.in_backbone for p in parameters):
        raise MFuserError(
            f"layer_decay = {layer_decay:g} changes nothing, since no encoder of this pairing "
            "trains; leave it out, or set vfm.freeze = false"
        )
    groups: dict[tuple[float, float, Ramp | None], list[nn.Parameter]] = {}
    for one, scale, decay, ramp in zip(parameters, scales, decays, ramps, strict=True):
        if scale is None:
            scale = recipe.backbone_lr if one.in_backbone else 1.0
        if layer_decay is not None:
            scale *= layer_decay**one.depth
        if decay is None:
            decay = recipe.base_decay
        if any(part in one.name for part in recipe.no_decay):
            decay = 0.0
        groups.setdefault((scale, decay, ramp), []).append(one.parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            "factor": factor,
            "decay": decay,
            "ramp": ramp,
        }
        for (factor, decay, ramp), parameters in groups.items()
    ]


def adamw(model: DGSSModel, recipe: RecipeSpec, fused: bool = False) -> torch.optim.AdamW:
    """Over `parameter_groups`. fused: in one kernel, which rounds in another order."""
    groups = parameter_groups(model, recipe)
    foreach = None if fused else True
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=fused or None, foreach=foreach)


def set_rates(optimizer: torch.optim.Optimizer, recipe: RecipeSpec, step: int) -> float:
    """Rate and weight decay of every group at a step (from 0); returns the rate before factors, of
    what has no ramp of its own."""
    factor = recipe.rate(step)
    for group in optimizer.param_groups:
        own = factor if group["ramp"] is None else recipe.rate(step, group["ramp"])
        group["lr"] = recipe.lr * own * group["factor"]
        group["weight_decay"] = recipe.decay_at(group["decay"], step)
    return recipe.lr * factor


def trained(model: DGSSModel, layers: bool = False) -> list[Trained]:
    """The trained parameters, in the model's order. layers: also find the encoders' layers."""
    place: dict[nn.Parameter, tuple[tuple[str, ...], int]] = {}
    for role, backbone in model.encoder.backbones.items():
        found = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        depths = layer_depths(backbone) if layers and found else {}
        outer = tuple(dict.fromkeys((role.partition("_")[0], role)))  # "vfm_2" is a "vfm"
        for name, parameter in found.items():
            inner = ("tuning",) if name in backbone.tuned else ()
            place.setdefault(parameter, (outer + inner, depths.get(name, 0)))
    result = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.removeprefix("encoder.").partition(".")[0]
            words = (PARTS.get(part, part),)
            result.append(Trained(name, parameter, *place.get(parameter, (words, 0))))
    return result


def _chosen(key: str, table: Mapping[str, T], parameters: list[Trained]) -> list[T | None]:
    """The value that a table of a recipe gives each parameter; None where no entry fits.

    Raises MFuserError for an entry that fits nothing, and for two that fit one parameter equally
    well and differ.
    """
    words = {word for one in parameters for word in one.words}
    used: set[str] = set()
    values: list[T | None] = []
    for one in parameters:
        fits = [entry for entry in table if _fits(entry, one)]
        used.update(fits)
        if not fits:
            values.append(None)
            continue
        best = max(_rank(entry, one) for entry in fits)
        alike = [entry for entry in fits if _rank(entry, one) == best]
        if len({table[entry] for entry in alike}) > 1:
            raise MFuserError(
                f"{key}: '{alike[0]}' and '{alike[1]}' both fit {one.name} and are equally "
                "specific; write one of them out further"
            )
        values.append(table[alike[0]])
    for entry in table:
        if entry not in used:
            raise MFuserError(f"{key}: {_unused(entry, words, parameters)}")
    return values


def _fits(entry: str, one: Trained) -> bool:
    if entry in one.words:
        return True
    return any(fnmatchcase(place, entry) for place in one.places())


def _rank(entry: str, one: Trained) -> tuple[int, int]:
    if entry in one.words:
        return 0, one.words.index(entry)
    return 1, len(re.sub(r"\[[^]]*\]|[*?]", "", entry))


def _unused(entry: str, words: set[str], parameters: list[Trained]) -> str:
    if entry in COMPONENTS:
        return (
            f"nothing of the component '{entry}' trains in this pairing; what does: "
            f"{listed(sorted(words))}"
        )
    names = dict.fromkeys(place for one in parameters for place in one.places())
    # Blocks are alike but for their number: the nearest name is as good in any of them.
    known = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names} | words
    near = suggest(re.sub(r"\.\d+(?=\.|$)", ".*", entry), known)
    if near.startswith("; available"):
        near = f"; components: {listed(sorted(words))}; a parameter: {parameters[-1].name}"
    return f"'{entry}' fits no parameter that trains{near}"
