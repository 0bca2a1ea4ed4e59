"""The weights of one model inside what others keep around them.

Wrapping in a table ({"state_dict": …}) and wrapping by a prefix ("module.backbone.…") are the same
thing once a table's key is written before its names with a dot. So a file is one flat table of
names, and the model's weights are what follows one of the prefixes: the one under which the names
of the model are found. Which prefixes those are is not a matter of a list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfuser.errors import WeightsError, suggest
from mfuser.weightfiles.contents import described, is_optimizer, without_model
from mfuser.weightfiles.reading import Content, is_safetensors, read_content

NOISE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, FSDP and activation checkpointing insert, at any depth."""

COMMON = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params",
    "weights", "backbone", "encoder",
)  # fmt: skip
"""Wrappers taken off where nothing is known of the model."""

AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?|shadow|teacher)(_|$)|^target_encoder$")
SECOND = re.compile(r"(^|_)(student|online|discriminator|momentum_encoder|encoder_k)(_|$)")

ORDER = ("averaged", "plain", "second")
"""The kinds of weights, as they are preferred."""

TRIED = 16
"""Prefixes tried at the most."""


class UndecidedError(WeightsError):
    """Several parts of a file fit, and nothing tells which is meant."""


@dataclass(frozen=True)
class Part:
    """The tensors below a prefix of a file. kind: of `ORDER` ("second": a student's)."""

    prefix: str
    tensors: dict[str, Tensor]
    kind: str
    found: int = 0
    """How many of the model's names there are among them."""

    @property
    def place(self) -> str:
        return f"'{self.prefix.rstrip('.')}'" if self.prefix else "the whole file"


@dataclass(frozen=True)
class Taken:
    """The part of a file that was used. part: before conversion. others: parts that would have
    fitted by their names. left: how many tensors of the file are in neither (optimizers aside)."""

    part: Part
    tensors: dict[str, Tensor]
    others: list[Part] = field(default_factory=list)
    left: int = 0

    def __str__(self) -> str:
        """One sentence; empty where the file is the weights and nothing else."""
        if not self.part.prefix:
            return ""
        text = f"took {self.part.place}"
        if self.part.kind == "averaged":
            text += " (averaged weights)"
        elif self.others:
            text += " (plain weights)"
        if self.others:
            names = ", ".join(
                f"{o.place}{' (averaged)' if o.kind == 'averaged' else ''}" for o in self.others
            )
            text += f' and not {names}; to choose, write "FILE#{_key(self.others[0].prefix)}"'
        if self.left:
            text += f"; {self.left} tensors of other parts were left out"
        return text


def _key(prefix: str) -> str:
    return prefix.rstrip(".")


def flat(content: Content) -> dict[str, Tensor]:
    """Every tensor of the file by its dotted place. Raises WeightsError if there is none."""
    tensors = dict(_walk(content.tree, ""))
    quiet = {_without_noise(name): value for name, value in tensors.items()}
    if len(quiet) == len(tensors):
        tensors = quiet
    if not tensors:
        raise WeightsError(
            f"{content.path} holds no named tensors, so it is not a weights file{_keys(content)}"
        )
    return tensors


def foreign(path: Path) -> str | None:
    """The format of a file other than safetensors; None for one that is, or is meant to be."""
    if is_safetensors(path):
        return None
    try:
        content = read_content(path)
        tensors = flat(content)
    except WeightsError as error:
        return str(error).removeprefix(f"{path} ")
    held = without_model(tensors, content.metadata) or described(tensors)
    return f"it was written by torch.save or torch.jit and holds {held}"


def _keys(content: Content) -> str:
    if not isinstance(content.tree, Mapping) or not content.tree:
        return f" (it holds a {type(content.tree).__name__})" if content.tree is not None else ""
    return f" (it holds {', '.join(map(str, list(content.tree)[:5]))})"


def _walk(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        if name:
            yield name, node
    elif isinstance(node, np.ndarray):
        if name and node.dtype.kind in "fiub" and node.dtype.isnative:
            yield name, torch.from_numpy(np.ascontiguousarray(node))
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _walk(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list | tuple) and name:
        for i, value in enumerate(node):
            yield from _walk(value, f"{name}.{i}")


def _without_noise(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in NOISE)


def take(
    content: Content,
    names: Collection[str],
    fit: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    what: str,
    source: str,
    part: str | None = None,
) -> Taken:
    """The part of a file that fits a model.

    names: some or all names under which the model's weights are published. fit: a part's tensors
    -> the model's, or WeightsError where they do not fit. what, source: the model and the weights,
    for the message. part: the prefix to look below, where the caller chose one.

    Averaged weights (EMA, a teacher's) come before plain ones, as timm takes them, and those before
    a student's. Raises WeightsError, saying what the file holds, if no part fits, or if two
    different ones fit and nothing tells which is meant.
    """
    tensors = flat(content)
    if part is not None:
        tensors = _below(tensors, part, content)
    parts = [_without_counters(p, names) for p in _parts(tensors, names, _swapped(content))]
    refused: WeightsError | None = None
    for candidate in parts:
        try:
            converted = fit(candidate.tensors)
        except WeightsError as error:
            refused = refused or error
            continue
        others = _rivals(candidate, parts)
        twins = [o for o in others if o.kind == candidate.kind and not _same(o, candidate)]
        if twins:
            places = ", ".join(p.place for p in (candidate, *twins))
            raise UndecidedError(
                f"{source} holds several sets of weights that fit {what}: {places}; say which: "
                f'"FILE#{_key(candidate.prefix)}"'
            )
        return Taken(candidate, converted, others, _left(tensors, [candidate, *others]))
    if held := without_model(tensors, content.metadata):
        raise WeightsError(f"{source} does not fit {what}: the file holds {held}")
    raise WeightsError(f"{refused}. The file holds {described(tensors)}") from refused


def _below(tensors: dict[str, Tensor], part: str, content: Content) -> dict[str, Tensor]:
    start = _without_noise(part.rstrip(".")) + "."
    below = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
    if not below:
        tops = dict.fromkeys(name.partition(".")[0] for name in tensors)
        raise WeightsError(f"{content.path} holds no '{part}'{suggest(part, tops)}")
    return below


def _swapped(content: Content) -> bool:
    """Whether it is a checkpoint of MMEngine, which stores the averaged weights as `state_dict` and
    the plain ones as `ema_state_dict` (EMAHook.before_save_checkpoint)."""
    tree = content.tree
    if not isinstance(tree, Mapping) or "ema_state_dict" not in tree:
        return False
    meta = tree.get("meta")
    return "message_hub" in tree or (isinstance(meta, Mapping) and "mmengine_version" in meta)


def _parts(tensors: dict[str, Tensor], names: Collection[str], swapped: bool) -> list[Part]:
    """Candidates, best first: prefixes under which the model's names are found, each followed by
    the shorter ones that a library's own conversion may want."""
    counts: Counter[str] = Counter()
    for name in tensors:
        if is_optimizer(name):
            continue
        for start in _starts(name):
            if name[len(start) :] in names:
                counts[start] += 1
    if not counts:
        prefix = common_prefix(tensors)
        return [_part(tensors, p, swapped) for p in dict.fromkeys((prefix, ""))]
    most = max(counts.values())
    found = {start: count for start, count in counts.items() if 2 * count >= most}
    best = [_part(tensors, start, swapped, count) for start, count in found.items()]
    best.sort(key=lambda part: (ORDER.index(part.kind), -part.found))
    starts = dict.fromkeys(
        start
        for part in best
        for start in (part.prefix, *reversed(list(_starts(part.prefix.rstrip(".")))))
    )
    return [_part(tensors, start, swapped, found.get(start, 0)) for start in list(starts)[:TRIED]]


def _starts(name: str) -> Iterator[str]:
    """ "a.b.c" -> "", "a.", "a.b." """
    yield ""
    for match in re.finditer(r"\.", name):
        yield name[: match.end()]


def _part(tensors: dict[str, Tensor], prefix: str, swapped: bool, found: int = 0) -> Part:
    words = prefix.rstrip(".").lower().split(".")
    kind = "plain"
    if any(SECOND.search(word) for word in words):
        kind = "second"
    elif any(AVERAGED.search(word) for word in words) or _counts_averages(tensors, prefix):
        kind = "averaged"
    if swapped and words[0] in ("state_dict", "ema_state_dict"):
        kind = "averaged" if words[0] == "state_dict" else "second"
    below = {
        name[len(prefix) :]: value
        for name, value in tensors.items()
        if name.startswith(prefix) and not is_optimizer(name)
    }
    return Part(prefix, below, kind, found)


def _without_counters(part: Part, names: Collection[str]) -> Part:
    """The part without numbers and generator states that stand beside the weights by themselves."""
    kept = {
        name: value
        for name, value in part.tensors.items()
        if name in names or "." in name or (value.dim() > 0 and value.is_floating_point())
    }
    return replace(part, tensors=kept)


def _counts_averages(tensors: dict[str, Tensor], prefix: str) -> bool:
    """Whether a torch.optim.swa_utils.AveragedModel stands at or above the prefix."""
    return any(f"{start}n_averaged" in tensors for start in _starts(prefix.rstrip(".")))


def _rivals(taken: Part, parts: list[Part]) -> list[Part]:
    """Other parts with as many of the model's names, apart from the one taken."""
    return [
        other
        for other in parts
        if other.found
        and 10 * other.found >= 9 * taken.found
        and not other.prefix.startswith(taken.prefix)
        and not taken.prefix.startswith(other.prefix)
    ]


def _same(one: Part, other: Part) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


def _left(tensors: dict[str, Tensor], parts: list[Part]) -> int:
    starts = tuple(part.prefix for part in parts)
    return sum(
        not name.startswith(starts) and not is_optimizer(name) and tensors[name].dim() > 0
        for name in tensors
    )


def common_prefix(tensors: Mapping[str, Tensor]) -> str:
    """The usual wrappers (`COMMON`) that stand before every name, numbers beside them aside."""
    names = [n for n, v in tensors.items() if v.dim() > 0 and not is_optimizer(n)]
    prefix = ""
    while names:
        firsts = {name[len(prefix) :].partition(".")[0] for name in names}
        first = firsts.pop()
        if firsts or not (first in COMMON or AVERAGED.search(first) or SECOND.search(first)):
            break
        prefix = f"{prefix}{first}."
    return prefix
