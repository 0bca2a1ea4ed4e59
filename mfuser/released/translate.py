"""Translating a state dict by a table of names, with every key accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfuser.errors import CheckpointError

SHOWN = 20
"""Names of each kind that an error lists."""


def _split_q(parts: list[Tensor]) -> list[Tensor]:
    third = len(parts[0]) // 3
    return [parts[0][:third], parts[0][third:]]


CHANGES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "as it is": lambda parts: parts,
    "without its leading axis of 1": lambda parts: [parts[0].flatten(0, 1)],
    "with a leading axis of 1": lambda parts: [parts[0][None]],
    "stacked": lambda parts: [torch.cat(parts)],
    "first third, the rest": _split_q,
}
"""Changes that a row may make besides renaming."""


@dataclass(frozen=True)
class Row:
    """Released names -> our names. {i} stands for one number, {rest} for whatever follows."""

    released: tuple[str, ...]
    ours: tuple[str, ...]
    change: str = "as it is"


def row(released: str | Sequence[str], ours: str | Sequence[str], change: str = "as it is") -> Row:
    """A line of a table; names that go together as sequences."""
    left = (released,) if isinstance(released, str) else tuple(released)
    right = (ours,) if isinstance(ours, str) else tuple(ours)
    assert change in CHANGES
    return Row(left, right, change)


def under(released: str, ours: str, *rows: Row) -> tuple[Row, ...]:
    """Rows below a prefix on each side."""
    return tuple(
        Row(
            tuple(released + name for name in r.released),
            tuple(ours + name for name in r.ours),
            r.change,
        )
        for r in rows
    )


@dataclass(frozen=True)
class Format:
    """One foreign layout of a state dict.

    marks: keys that distinguish it; unmarked: prefixes that it lacks.
    rows: its table; the first that matches counts. unused: names without a place in our model,
    and why. kept: our parameters that it lacks: the value they get, and why.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    rows: tuple[Row, ...]
    unused: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    unmarked: tuple[str, ...] = ()

    def matches(self, keys: set[str]) -> bool:
        return all(m in keys for m in self.marks) and not any(
            key.startswith(self.unmarked) for key in keys if self.unmarked
        )


@dataclass
class Translation:
    """tensors: by our names. sources: our name -> the released names it came from. unused: released
    name -> why. kept: our name -> why it keeps its initial value."""

    form: Format
    tensors: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    unused: dict[str, str]
    kept: dict[str, str]

    def reasons(self) -> dict[str, list[str]]:
        """Reason -> the unused keys it is given for."""
        found: dict[str, list[str]] = {}
        for key, reason in self.unused.items():
            found.setdefault(reason, []).append(key)
        return found


def translate(
    state: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    form: Format,
    source: str = "the state dict",
) -> Translation:
    """A foreign state dict -> tensors for a model whose state dict has the `expected` shapes.

    Raises CheckpointError listing every key that is missing, unexpected or of another shape.
    """
    result = Translation(form, {}, {}, {}, {})
    missing: list[str] = []
    unexpected: list[str] = []
    misshapen: list[str] = []
    for key in state:
        found = _row_of(key, form.rows)
        reason = _unused(key, form)
        if reason is not None:
            result.unused[key] = reason
        elif found is None:
            unexpected.append(key)
        else:
            line, match = found
            names = [_fill(name, match) for name in line.released]
            if key != names[0]:
                # Handled with the first of the row; without that one, the first is missing.
                missing += [names[0]] if names[0] not in state else []
                continue
            absent = [n for n in names if n not in state]
            targets = [_fill(name, match) for name in line.ours]
            if absent:
                missing += absent
                result.sources |= dict.fromkeys(targets, tuple(names))
            elif any(t not in expected for t in targets):
                unexpected += names
            else:
                _place(result, expected, line, names, targets, state, misshapen)
    for name in expected:
        if name in result.sources:
            continue
        kept = form.kept.get(name)
        if kept is not None:
            result.tensors[name] = torch.full(expected[name], kept[0])
            result.kept[name] = kept[1]
        else:
            missing += _released_names(name, form.rows)
    _check(form, source, missing, unexpected, misshapen)
    return result


def _place(
    result: Translation,
    expected: Mapping[str, torch.Size],
    line: Row,
    names: list[str],
    targets: list[str],
    state: Mapping[str, Tensor],
    misshapen: list[str],
) -> None:
    """Put the tensors of one row where they belong, or note those of the wrong shape."""
    parts = [state[n] for n in names]
    for target in targets:
        result.sources[target] = tuple(names)
    given = ", ".join(f"{n} is {_shape(p.shape)}" for n, p in zip(names, parts, strict=True))
    try:
        made = CHANGES[line.change](parts)
    except (RuntimeError, IndexError, TypeError):
        misshapen.append(given)
        return
    for target, tensor in zip(targets, made, strict=True):
        if tensor.shape != expected[target]:
            misshapen.append(f"{given}, for {target} {_shape(expected[target])}")
        result.tensors[target] = tensor


def _check(
    form: Format, source: str, missing: list[str], unexpected: list[str], misshapen: list[str]
) -> None:
    problems = [
        f"{len(names)} {what}: {'; '.join(names[:SHOWN])}"
        + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for what, names in (
            ("missing", list(dict.fromkeys(missing))),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if not problems:
        return
    sized = any(re.search(r"pos\w*_embed", m) for m in misshapen)
    hint = (
        ". The position tables differ: give the image_size, patch_size and prompt (context, slots) "
        "that it was trained with"
        if sized
        else ""
    )
    raise CheckpointError(
        f"{source} ({form.title}) does not fit this pairing. {'. '.join(problems)}{hint}"
    )


def _pattern(template: str) -> re.Pattern[str]:
    text = (
        re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)")
    )
    return re.compile(text)


_patterns: dict[str, re.Pattern[str]] = {}


def _match(template: str, name: str) -> dict[str, str] | None:
    if template not in _patterns:
        _patterns[template] = _pattern(template)
    found = _patterns[template].fullmatch(name)
    return None if found is None else found.groupdict()


def _fill(template: str, match: Mapping[str, str]) -> str:
    return template.format(**match)


def _row_of(key: str, rows: Iterable[Row]) -> tuple[Row, dict[str, str]] | None:
    for line in rows:
        for template in line.released:
            if (match := _match(template, key)) is not None:
                return line, match
    return None


def _released_names(ours: str, rows: Iterable[Row]) -> list[str]:
    """A released file's name for our parameter; our own name where it has none."""
    for line in rows:
        for template in line.ours:
            if (match := _match(template, ours)) is not None:
                return [_fill(name, match) for name in line.released]
    return [f"{ours} (ours; this format has no such tensor)"]


def _unused(key: str, form: Format) -> str | None:
    for template, reason in form.unused.items():
        if _match(template, key) is not None:
            return reason
    return None


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
