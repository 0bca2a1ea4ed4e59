"""Inspects an undescribed folder of images and masks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from mfuser.data.images import UnreadableImage, image_size, read_label
from mfuser.specs import Proposal
from mfuser_plugins.datasets._files import some, walk

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
SAMPLE = 200
"""Masks that are opened."""
MANY_COLORS = 256
"""More distinct values than this are a photograph, or a mask saved as one."""
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
NAME_FILES = ("classes.txt", "labels.txt", "names.txt", "class_names.txt", "codes.txt")
MASK_WORDS = ("mask", "label", "annot", "gt", "seg", "truth")
LISTS = ("ImageSets/Segmentation/{split}.txt", "splits/{split}.txt", "{split}.txt")
VAL_SHARE = 0.2


@dataclass
class Group:
    """The image files below one folder, of which one part may be "{split}"."""

    folder: str
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    splits: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Match:
    images: Group
    masks: Group
    image_suffix: str
    mask_suffix: str
    pairs: list[tuple[str, str]]


def propose(folder: Path) -> Proposal | None:
    """The options of `folder` for a folder as it lies; None where nothing pairs."""
    listed = sorted(f for f in walk(folder) if f.lower().endswith(ENDINGS))
    match = _best(folder, listed)
    if match is None:
        return None
    found: list[str] = []
    odd: list[str] = []
    names = {g.folder: _pattern(g) or "." for g in (match.images, match.masks)}
    options: dict[str, Any] = {
        "images": names[match.images.folder],
        "masks": names[match.masks.folder],
    }
    if match.images is match.masks and not match.mask_suffix:
        for key, k in (("images", 0), ("masks", 1)):  # told apart by their endings
            ending = match.pairs[0][k].rpartition(".")[2]
            options[key] = f"{options[key]}/*.{ending}".removeprefix("./")
    for key, suffix in (("image_suffix", match.image_suffix), ("mask_suffix", match.mask_suffix)):
        if suffix:
            options[key] = suffix
    lists = next((p for p in LISTS if (folder / p.format(split="train")).is_file()), None)
    if lists is not None:
        options["lists"] = lists
    elif "{split}" not in options["images"]:
        options["val_share"] = VAL_SHARE
    unpaired = sum(map(len, match.images.keys.values())) - len(match.pairs)
    if unpaired > 0 and match.images is not match.masks and lists is None:
        odd.append(f"{unpaired} images have no mask of the same stem")
    sizes = _sizes(folder, [image for image, _ in match.pairs])
    more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
    shown = ", ".join(f"{w}x{h}" for w, h in list(sizes)[:3])
    found.append(f"{len(match.pairs)} pairs: {shown}{more}")
    masks = sorted({folder / m for _, m in match.pairs})
    seen = _Seen.of(masks)
    odd += seen.odd
    classes = seen.classes(_names(folder))
    if classes is None:
        return None
    options |= classes.options
    found += classes.found
    odd += classes.odd
    size = next(iter(sizes), None)
    return Proposal(options, classes.names, tuple(found), tuple(odd), 0.5, size)


def _best(folder: Path, listed: list[str]) -> Match | None:
    """The two groups whose stems agree most, the more mask-like one as masks."""
    groups: dict[str, Group] = {}
    for name in listed:
        parts = list(PurePosixPath(name).parts[:-1])
        at = next((k for k, part in enumerate(parts) if part in SPLITS), -1)
        split = parts[at] if at >= 0 else ""
        if at >= 0:
            parts[at] = "{split}"
        stem = PurePosixPath(name).name.rpartition(".")[0]
        for depth in range(at + 1, min(len(parts), at + 5) + 1):
            base = "/".join(parts[:depth])
            group = groups.setdefault(base, Group(base))
            group.splits[split] += 1
            group.keys["/".join([*parts[depth:], stem])].append(name)
    likeness = {base: _mask_likeness(folder, group) for base, group in groups.items()}
    best: tuple[float, Match] | None = None
    for a in groups.values():
        for b in groups.values():
            inside = a.folder == b.folder
            if not inside and (_below(a.folder, b.folder) or _below(b.folder, a.folder)):
                continue
            match = _match(a, b) if not inside else _match_inside(a)
            if match is None:
                continue
            masklike = (
                likeness[b.folder] - likeness[a.folder]
                if not inside
                else _likeness(folder, [m for _, m in match.pairs[:8]]) - 0.5
            )
            if masklike <= 0:
                continue
            # Of equal agreement, the deeper folders: they say more.
            score = len(match.pairs) + 0.01 * masklike + 0.001 * len(b.folder.split("/"))
            if best is None or score > best[0]:
                best = (score, match)
    return best[1] if best else None


def _below(inner: str, outer: str) -> bool:
    return outer == "" or inner.startswith(outer + "/")


def _match(images: Group, masks: Group) -> Match | None:
    shared = [k for k in images.keys if k in masks.keys]
    if shared:
        pairs = [p for k in shared for p in zip(images.keys[k], masks.keys[k], strict=False)]
        return Match(images, masks, "", "", pairs)
    for image_suffix, mask_suffix in _suffixes(images.keys, masks.keys):
        stems = {k[: len(k) - len(mask_suffix)]: k for k in masks.keys if k.endswith(mask_suffix)}
        pairs = []
        for key in images.keys:
            stem = key[: len(key) - len(image_suffix)] if image_suffix else key
            if key.endswith(image_suffix) and stem in stems:
                pairs += zip(images.keys[key], masks.keys[stems[stem]], strict=False)
        if len(pairs) > len(images.keys) // 2:
            return Match(images, masks, image_suffix, mask_suffix, pairs)
    return None


def _match_inside(group: Group) -> Match | None:
    """One folder for both: a.jpg beside a.png, or a_mask.png."""
    endings = [(k, names) for k, names in group.keys.items() if len(names) == 2]
    if len(endings) > len(group.keys) // 2:
        pairs = []
        for _, names in endings:
            image, mask = sorted(names, key=lambda n: n.lower().endswith(".png"))
            pairs.append((image, mask))
        return (
            None
            if all(m.endswith(i[-4:]) for i, m in pairs)
            else Match(group, group, "", "", pairs)
        )
    for suffix in _common_endings(group.keys):
        pairs = [
            (group.keys[k[: -len(suffix)]][0], names[0])
            for k, names in group.keys.items()
            if k.endswith(suffix) and k[: -len(suffix)] in group.keys
        ]
        if len(pairs) * 2 > len(group.keys) // 2:
            return Match(group, group, "", suffix, sorted(pairs))
    return None


def _suffixes(images: Iterable[str], masks: Iterable[str]) -> list[tuple[str, str]]:
    """Suffixes after a common stem: the first image, and the mask that shares most with it."""
    image = min(images, default="")
    tried = []
    for mask in sorted(masks, key=lambda m: -_agreeing(image, m))[:3]:
        length = _agreeing(image, mask)
        # A stem ends where letters and digits do: "0001_rgb" and "0001_label" share "0001".
        while length > 0 and not (image[length:] == "" or image[length] in "_-." or
                                  mask[length:] == "" or mask[length] in "_-."):  # fmt: skip
            length -= 1
        if length:
            tried.append((image[length:], mask[length:]))
    return list(dict.fromkeys(tried))


def _agreeing(a: str, b: str) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _common_endings(keys: Iterable[str]) -> list[str]:
    """Endings from the last _, - or . on that at least a third of the keys have."""
    keys = list(keys)
    counts: Counter[str] = Counter()
    for key in keys:
        cut = max(key.rfind(c) for c in "_-.")
        if cut > key.rfind("/") + 1:
            counts[key[cut:]] += 1
    return [e for e, n in counts.most_common(3) if n * 3 >= len(keys) and n > 1]


def _pattern(group: Group) -> str:
    """The folder as an option; "{split}" only where both splits are there."""
    kinds = {SPLITS[name] for name in group.splits if name}
    if len(kinds) == 2 or "{split}" not in group.folder:
        return group.folder
    return group.folder.replace("{split}", next(iter(group.splits)))


def _mask_likeness(folder: Path, group: Group) -> float:
    names = sorted(n for ns in group.keys.values() for n in ns)
    return _likeness(folder, names[:: max(1, len(names) // 6)][:6])


def _likeness(folder: Path, names: list[str]) -> float:
    """0 (photographs) to 1 (masks), by the files themselves."""
    scores = []
    for name in names:
        try:
            with Image.open(folder / name) as image:
                if image.mode in ("P", "1", "I;16", "I"):
                    scores.append(1.0)
                    continue
                image.thumbnail((256, 256), Image.Resampling.NEAREST)
                colors = image.getcolors(4096)
                pixels = image.width * image.height
        except (OSError, ValueError, SyntaxError):
            continue
        distinct = len(colors) if colors is not None else 4096
        scores.append(max(0.0, 1 - max(distinct / 300, 2 * distinct / pixels)))
    named = any(word in names[0].lower() for word in MASK_WORDS) if names else False
    return (sum(scores) / len(scores) if scores else 0.0) + 0.5 * named


def _sizes(folder: Path, images: list[str]) -> dict[tuple[int, int], int]:
    """(width, height) of a sample, and of how many, the most frequent first."""
    sizes: Counter[tuple[int, int]] = Counter()
    for name in images[:: max(1, len(images) // SAMPLE)]:
        try:
            sizes[image_size(folder / name)] += 1
        except UnreadableImage:
            continue
    return dict(sizes.most_common())


@dataclass
class _Found:
    options: dict[str, Any]
    names: tuple[str, ...]
    found: list[str]
    odd: list[str]


@dataclass
class _Seen:
    """Values (or colors) of the sampled masks with their pixels."""

    values: Counter[int] = field(default_factory=Counter)
    colors: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    pictures: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    opened: int = 0
    odd: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, masks: list[Path]) -> _Seen:
        seen = cls()
        for path in masks[:: max(1, len(masks) // SAMPLE)]:
            try:
                raw = read_label(path)
            except UnreadableImage:
                seen.unreadable.append(path.name)
                continue
            seen.opened += 1
            if raw.ndim == 3 and (raw[..., :3] == raw[..., :1]).all():
                raw = raw[..., 0]
            if raw.ndim == 2:
                values, counts = np.unique(raw, return_counts=True)
                if path.suffix.lower() in (".jpg", ".jpeg") and len(values) > 2:
                    seen.pictures.append(path.name)
                for v, n in zip(values.tolist(), counts.tolist(), strict=True):
                    seen.values[int(v)] += n
                continue
            flat = raw[..., :3].reshape(-1, 3)
            colors, counts = np.unique(flat, axis=0, return_counts=True)
            if len(colors) > MANY_COLORS:
                seen.pictures.append(path.name)
                continue
            for c, n in zip(colors.tolist(), counts.tolist(), strict=True):
                seen.colors[(int(c[0]), int(c[1]), int(c[2]))] += n
        if seen.unreadable:
            seen.odd.append(f"{len(seen.unreadable)} masks cannot be read: {some(seen.unreadable)}")
        if seen.pictures:
            seen.odd.append(
                f"{len(seen.pictures)} of {seen.opened} masks were saved as pictures (JPEG, or "
                f"smoothed edges): {some(seen.pictures)}; their ids are lost, export them again "
                "as PNG without smoothing"
            )
        if seen.values and seen.colors:
            seen.odd.append("some masks hold ids and others colors; the more frequent kind is read")
        return seen

    def classes(self, names: list[str]) -> _Found | None:
        if sum(self.colors.values()) > sum(self.values.values()):
            return self._from_colors(names)
        return self._from_values(names) if self.values else None

    def _from_values(self, names: list[str]) -> _Found:
        total = sum(self.values.values())
        odd: list[str] = []
        known = sorted(self.values)
        shares = {v: n / total for v, n in self.values.items()}
        found = [f"masks hold ids, {self.opened} opened: {_shares(shares)}"]
        if len(known) == 2 and known[0] == 0 and (known[1] == 255 or len(names) == 2):
            chosen = tuple(names) if len(names) == 2 else ("background", "foreground")
            return _Found({"classes": list(chosen), "encoding": "binary"}, chosen, found, odd)
        scored = [v for v in known if v != 255]
        if 255 in shares:
            found.append(f"255 is ignored ({shares[255]:.1%} of the pixels)")
        if names and scored and scored[-1] == len(names):
            found.append(f"{len(names)} names and ids up to {len(names)}: off by one, 0 is ignored")
            return _Found(
                {"classes": list(names), "encoding": "off_by_one"}, tuple(names), found, odd
            )
        if names and scored and scored[-1] < len(names):
            return _Found({"classes": list(names)}, tuple(names), found, odd)
        if names:
            odd.append(
                f"{len(names)} names are given, and ids go up to {scored[-1]}; names are made up"
            )
        if len(scored) > 64 and scored[-1] > 250:
            odd.append(
                f"{len(scored)} different values: a mask with blurred edges, or instance ids; "
                "classes must be one value each"
            )
        table = {str(v): f"class_{v}" for v in scored}
        return _Found({"classes": table}, tuple(table.values()), found, odd)

    def _from_colors(self, names: list[str]) -> _Found:
        total = sum(self.colors.values())
        ordered = [c for c, _ in sorted(self.colors.items())]
        shown = {"#{:02x}{:02x}{:02x}".format(*c): self.colors[c] / total for c in ordered}
        odd: list[str] = []
        if len(names) != len(ordered):
            if names:
                odd.append(f"{len(names)} names and {len(ordered)} colors; names are made up")
            names = [f"class_{k}" for k in range(len(ordered))]
        table = dict(zip(shown, names, strict=True))
        found = [f"masks hold colors, {self.opened} opened: {_shares(shown)}"]
        rare = [c for c, share in shown.items() if share < 1e-4]
        if len(rare) > 3:
            odd.append(f"{len(rare)} colors cover less than 0.01 % each: smoothed edges?")
        return _Found({"classes": table}, tuple(dict.fromkeys(names)), found, odd)


def _shares(shares: dict[Any, float]) -> str:
    top = sorted(shares.items(), key=lambda item: -item[1])
    text = ", ".join(f"{value} {share:.1%}" for value, share in top[:12])
    return text + (f", and {len(top) - 12} more" if len(top) > 12 else "")


def _names(folder: Path) -> list[str]:
    """Class names that lie beside the masks, one per line."""
    for name in NAME_FILES:
        path = folder / name
        if path.is_file():
            try:
                lines = path.read_text("utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError):
                continue
            return [line.strip() for line in lines if line.strip()]
    return []
