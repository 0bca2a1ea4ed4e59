"""Docstrings of the house in Markdown: sentences "name: what it is" become lists."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import griffe

LINE = re.compile(r"[a-z_]+(?:, [a-z_]+)*: \S.*")


def entries(text: str, known: Collection[str]) -> str:
    """The text with parameters and attributes as lists, one entry each.

    An entry starts a paragraph, a line below another entry, or, where its names are `known`, a
    sentence. Code, which is indented, and all other prose stay as they are.
    """
    names = "|".join(sorted(map(re.escape, known), key=len, reverse=True)) or "(?!)"
    sentence = re.compile(rf"(?:(?<=[.;] )|^)((?:{names})(?:, (?:{names}))*): ")
    out: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if not lines or lines[0].startswith(" "):
            out += [*lines, ""]
            continue
        paragraphs = [lines[0]]
        for line in lines[1:]:
            if LINE.fullmatch(line) and LINE.fullmatch(paragraphs[-1]):
                paragraphs.append(line)
            else:
                paragraphs[-1] += f" {line.strip()}"
        for paragraph in paragraphs:
            prose, *rest = sentence.split(paragraph)
            found = list(zip(rest[::2], rest[1::2], strict=True))
            if not found and LINE.fullmatch(paragraph) and len(paragraphs) > 1:
                name, _, what = paragraph.partition(": ")
                prose, found = "", [(name, what)]
            if prose.strip():
                out += [prose.strip(), ""]
            out += [f"- `{name}`: {what.strip()}" for name, what in found]
        out.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


class Entries(griffe.Extension):
    """Applied to every docstring once a package is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._rewrite(pkg)

    def _rewrite(self, obj: griffe.Object) -> None:
        if obj.docstring and "Args:" not in obj.docstring.value:
            known = (
                [p.name for p in obj.parameters]
                if isinstance(obj, griffe.Function)
                else [n for n in obj.members if not n.startswith("_")]
            )
            obj.docstring.value = entries(obj.docstring.value, known)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member)  # type: ignore[arg-type]
