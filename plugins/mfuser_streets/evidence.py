"""Tables and pictures of what the towers in miniature are worth; docs/world.md shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mfuser.config.classes import CITYSCAPES
from mfuser_streets import probe
from mfuser_streets.probe import TARGETS, Head
from mfuser_streets.world import scenes, space

Say = Callable[[str], Any]


def probes(
    names: Sequence[str],
    head: Head,
    seeds: int,
    train_images: int,
    steps: int,
    images: int,
    tests: Sequence[str],
    weights: dict[str, Path | None],
    say: Say | None = None,
) -> list[dict[str, Any]]:
    """A row of mIoU by domain for every tower and seed; `unseen` is their mean but the source's."""
    train = probe.pictures(scenes.SOURCE, "train", train_images)
    test = {d: probe.pictures(d, "val", images) for d in tests}
    cached: dict[str, dict[str, torch.Tensor]] = {}
    rows = []
    for name in names:
        for seed in range(seeds):
            if name == "scratch":
                row: dict[str, Any] = probe.from_scratch(train, test, seed, steps)
            else:
                row = _probed(name, head, seed, steps, train, test, cached, weights)
            unseen = [row[d] for d in tests if d != scenes.SOURCE]
            rows.append({"tower": name, "head": head, "seed": seed, **row,
                         "unseen": float(np.mean(unseen))})  # fmt: skip
            if say:
                told = "  ".join(f"{d} {row[d]:5.1f}" for d in tests)
                extra = f"  oracle {row['oracle']:.1f}" if "oracle" in row else ""
                say(f"{name:8} {head} seed {seed}: {told}  unseen {rows[-1]['unseen']:.1f}{extra}")
    return rows


def _probed(
    name: str,
    head: Head,
    seed: int,
    steps: int,
    train: probe.Pictures,
    test: dict[str, probe.Pictures],
    cached: dict[str, dict[str, torch.Tensor]],
    weights: dict[str, Path | None],
) -> dict[str, Any]:
    parts = name.split("+")
    for part in parts:
        if part not in cached:
            vit = probe.tower(part, weights.get(part))
            shown = {"train": train.images, **{d: p.images for d, p in test.items()}}
            cached[part] = {d: probe.features(vit, images) for d, images in shown.items()}

    def predictions(chosen: Sequence[str]) -> dict[str, np.ndarray]:
        joined = {d: torch.cat([cached[part][d] for part in chosen], -1) for d in ("train", *test)}
        head_ = probe.train_probe(joined["train"], train.labels, head, seed, steps)
        return {d: probe.predict(head_, joined[d]) for d in test}

    found = predictions(parts)
    row: dict[str, Any] = {d: probe.miou(probe.confusion(found[d], test[d].labels)) for d in test}
    if len(parts) == 2:
        first, second = (predictions([part]) for part in parts)
        best = {
            d: probe.miou(
                probe.confusion(probe.oracle(first[d], second[d], test[d].labels), test[d].labels)
            )
            for d in test
            if d != scenes.SOURCE
        }
        row["oracle"] = float(np.mean(list(best.values())))
    return row


def words(images: int, weights: Path | None = None) -> dict[str, dict[str, float]]:
    """Domain -> class -> area under the ROC curve, and the mean over the targets."""
    model = probe.clip(weights)
    found = {}
    for domain in (scenes.SOURCE, *TARGETS):
        seen = probe.pictures(domain, "val", images)
        found[domain] = probe.word_aucs(probe.word_maps(model, seen.images), seen.labels)
    return found


def pca_picture(path: Path, vfm: Path | None = None, vlm: Path | None = None) -> None:
    """Columns: picture, labels, PCA of mini-vfm, PCA of mini-vlm, map of the word "car"."""
    clip = probe.clip(vlm)
    vits = (probe.tower("vfm", vfm), clip.visual.trunk)
    rows = []
    base = [probe.features(v, probe.pictures(scenes.SOURCE, "val", 8).images) for v in vits]
    car = CITYSCAPES.names.index("car")
    for domain in (scenes.SOURCE, *TARGETS):
        seen = probe.pictures(domain, "val", 2)
        maps = probe.word_maps(clip, seen.images)[..., car].reshape(2, *probe.GRID).numpy()
        colors = [
            probe.pca(probe.features(v, seen.images), b) for v, b in zip(vits, base, strict=True)
        ]
        i = 1
        heat = np.clip((maps[i] - maps.min()) / (np.ptp(maps) + 1e-6) * 255, 0, 255)
        rows.append(np.hstack([
            seen.images[i], _colored(seen.labels[i]), *(_enlarged(c[i]) for c in colors),
            _enlarged(np.repeat(heat[..., None].astype(np.uint8), 3, 2)),
        ]))  # fmt: skip
    _save(np.vstack(rows), path)


def world_picture(path: Path, across: int = 5) -> None:
    """Rows: the source, the targets, one row of each family of pretraining and development."""
    rows = []
    for domain in (scenes.SOURCE, *TARGETS):
        seen = probe.pictures(domain, "val", across)
        rows.append(np.hstack(list(seen.images)))
        if domain in (scenes.SOURCE, TARGETS[-1]):
            rows.append(np.hstack([_colored(label) for label in seen.labels]))
    for domain, boxes in (("space", space.PRETRAINING), ("development", space.DEVELOPMENT)):
        n = len(boxes)
        seen = probe.pictures(domain, "train", n * across)
        rows += [np.hstack(list(seen.images[k::n])) for k in range(n)]
    _save(np.vstack(rows), path)


def _colored(label: np.ndarray) -> np.ndarray:
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(CITYSCAPES.colors)] = CITYSCAPES.colors
    return colors[label]


def _enlarged(cells: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(cells, 8, 0), 8, 1)


def _save(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    few = Image.fromarray(picture).quantize(
        256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    )
    few.save(path, optimize=True)
