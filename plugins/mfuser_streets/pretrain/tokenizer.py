"""The tokenizer of mini-vlm: byte-pair merges, learned until every word of the captions is one
token, in the file format of CLIP's."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mfuser_streets.world.captions import WORDS


def merges(words: Iterable[str] = WORDS) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016) run to its end; ties go to the first by name."""
    pieces = [(*word[:-1], f"{word[-1]}</w>") for word in sorted(words)]
    learned: list[tuple[str, str]] = []
    while True:
        pairs = Counter(p for w in pieces for p in zip(w[:-1], w[1:], strict=True))
        if not pairs:
            return learned
        best = min(pairs, key=lambda p: (-pairs[p], p))
        learned.append(best)
        pieces = [_merged(w, best) for w in pieces]


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def write(path: Path) -> int:
    """The merges as a file; the number of tokens, with CLIP's bytes and its two marks."""
    learned = merges()
    text = "\n".join(["mini-vlm", *(" ".join(pair) for pair in learned)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return 2 * 256 + len(learned) + 2
