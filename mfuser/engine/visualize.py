"""Pictures of a model's features, its words, and its masks beside those of others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mfuser.data.loading import ClassMap
from mfuser.engine import photographs
from mfuser.engine.console import Console
from mfuser.engine.decision import predict_ids
from mfuser.engine.inputs import file_names
from mfuser.engine.measure import test_scale
from mfuser.engine.photographs import Scale, located
from mfuser.engine.similarity import check_texts, similarity
from mfuser.errors import MFuserError
from mfuser.files import check_writable, clear_leftovers
from mfuser.inference import Inference
from mfuser.interfaces import Dataset
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel, batched, evaluating
from mfuser.model.sliding_window import blended, check_window, window_origins
from mfuser.reporting import draw
from mfuser.reporting.pca import Components

PATCHES = 1000
"""Evenly spaced patches of each image, from which the common components are computed."""
KEPT = 1024
"""Width in which the maps of an image wait for their common scale; finer than any patch grid."""
ROWS = 40
"""Images to a sheet."""


@dataclass
class Canvas:
    """The folder of the pictures, and how images are read. width: of a panel on the sheets."""

    out: Path
    scale: Scale = "auto"
    stride: tuple[int, int] | None = None
    width: int = 384
    device: torch.device = torch.device("cpu")
    console: Console = field(default_factory=Console)

    def look(self, model: DGSSModel, images: Sequence[Path]) -> list[str]:
        """Read every image, before anything is written; returns names for their pictures."""
        photographs.check_scale(self.scale)
        check_writable(self.out)
        window = model.spec.image_size
        for path in images:
            with located(path):
                size = photographs.read(path).shape[:2]
                check_window(photographs.scaled(size, self.scale, window), window)
        self.out.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.out)
        return file_names(images)

    def each(self, label: str, images: Sequence[Path]) -> Iterator[tuple[int, Path, np.ndarray]]:
        with self.console.task(label, len(images)) as task:
            for i, path in enumerate(images):
                yield i, path, photographs.read(path)
                task.advance()

    def pixels(self, model: DGSSModel, image: np.ndarray) -> Tensor:
        return photographs.pixels(image, self.scale, model.spec.image_size, self.device)

    def save(self, picture: np.ndarray, name: str) -> str:
        path = self.out / name
        draw.save(Image.fromarray(picture), path)
        return str(path)

    def small(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.asarray(draw.scaled(p, self.width)) for p in pictures]

    def sheets(
        self,
        kind: str,
        rows: Sequence[Sequence[np.ndarray]],
        titles: Sequence[str],
        names: Sequence[str],
        below: Callable[[int], Image.Image] | None = None,
    ) -> list[str]:
        """All images on sheets; below: made for the width of a sheet and put under it."""
        written = []
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            sheet = draw.panels(rows[part], titles, self.width, names[part])
            if below is not None:
                sheet = draw.stacked(sheet, below(sheet.width))
            number = f"-{start // ROWS + 1}" if start else ""
            path = self.out / f"all{number}.{kind}.png"
            draw.save(sheet, path)
            written.append(str(path))
        return written


def before(model: DGSSModel, seed: int) -> DGSSModel:
    """The model whose encoders are as they were before training: itself, where all are frozen."""
    towers = model.encoder.backbones.values()
    if model.spec.tuning is None and not any(
        p.requires_grad for t in towers for p in t.parameters()
    ):
        return model
    other = build_model(model.spec.model_copy(update={"tuning": None}), seed=seed)
    return other.to(next(model.parameters()).device)


def pca(
    model: DGSSModel, untrained: DGSSModel, images: Sequence[Path], canvas: Canvas
) -> dict[str, Any]:
    """NAME.ENCODER-STAGE.pca.png of every image, in its size, and sheets of all.

    The features are each encoder's patch tokens after its last block and `finish`, every token
    standardized. "before": of `untrained` (see `before`), each encoder for itself; "after": of
    `model`, with the offsets of its adapters. The components of an encoder and a stage are common
    to all images, and those of "after" have the signs under which they vary as those of "before".
    """
    names = canvas.look(model, images)
    models = {"before": untrained, "after": model}
    if untrained is model and not len(model.encoder.adapters):
        del models["before"]  # nothing is between the two

    def features(windows: Tensor) -> dict[str, Tensor]:
        """(B, h, w, D) by "ENCODER-STAGE"."""
        found = {}
        for stage, one in models.items():
            for role, maps in one.encoder.features(windows, fused=stage == "after").items():
                found[f"{role}-{stage}"] = F.layer_norm(maps.float(), maps.shape[-1:])
        order = [f"{role}-{stage}" for role in model.encoder.backbones for stage in models]
        return {name: found[name] for name in order}

    with evaluating(model), evaluating(untrained):
        seen: dict[str, list[Tensor]] = {}
        for _, _, image in canvas.each("reading", images):
            for name, patches in _patches(features, canvas.pixels(model, image), model).items():
                seen.setdefault(name, []).append(patches)
        components = _components({name: torch.cat(parts) for name, parts in seen.items()})

        def projected(windows: Tensor) -> Tensor:
            size = (windows.shape[-2], windows.shape[-1])
            maps = [components[n].project(f) for n, f in features(windows).items()]
            return torch.cat(
                [F.interpolate(m.permute(0, 3, 1, 2), size, mode="bilinear") for m in maps], 1
            )

        rows, entries = [], []
        for i, path, image in canvas.each("drawing", images):
            tensor = batched(canvas.pixels(model, image))
            low = blended(projected, tensor, model.spec.image_size, canvas.stride)
            low = F.interpolate(low, image.shape[:2], mode="bilinear")[0]
            pictures = {
                name: components[name].colors(part.permute(1, 2, 0))
                for name, part in zip(components, low.split(3), strict=True)
            }
            files = {n: canvas.save(p, f"{names[i]}.{n}.pca.png") for n, p in pictures.items()}
            entries.append({"image": str(path), "pictures": files})
            rows.append(canvas.small([image, *pictures.values()]))
    titles = ["image", *(name.replace("-", " ") for name in components)]
    sheets = canvas.sheets("pca", rows, titles, names)
    return {"sheets": sheets, "images": entries}


def _patches(
    features: Callable[[Tensor], dict[str, Tensor]], images: Tensor, model: DGSSModel
) -> dict[str, Tensor]:
    """Up to PATCHES features (n, D) of one image, from windows side by side."""
    images = batched(images)
    height, width = model.spec.image_size
    found: dict[str, list[Tensor]] = {}
    for y in window_origins(images.shape[-2], height, height):
        for x in window_origins(images.shape[-1], width, width):
            crop = images[..., y : y + height, x : x + width]
            for name, maps in features(crop).items():
                found.setdefault(name, []).append(maps.flatten(0, 2))
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: f[:: -(-len(f) // PATCHES)] for name, f in whole.items()}


def _components(features: dict[str, Tensor]) -> dict[str, Components]:
    found = {name: Components.of(patches) for name, patches in features.items()}
    for name in found:
        start = name.replace("-after", "-before")
        if start != name and start in found:
            found[name] = found[name].facing(features[name], found[start], features[start])
    return found


def text_maps(
    model: DGSSModel,
    images: Sequence[Path],
    texts: Sequence[str],
    canvas: Canvas,
    untrained: DGSSModel | None = None,
) -> dict[str, Any]:
    """NAME.TEXT.similarity.png of every image, in its size, and sheets of all with scale bars.

    The cosines of `similarity`, in colors from the least to the largest over all images, text by
    text. untrained: also the vision-language model for itself, as it was before training.
    """
    check_texts(model, texts)
    names = canvas.look(model, images)
    columns = [(text, model, False) for text in texts]
    if untrained is not None:
        columns = [c for text in texts for c in ((text, untrained, True), (text, model, False))]
    maps: list[np.ndarray] = []  # (columns, h, w) of each image
    for _, _, image in canvas.each("comparing", images):
        pixels = canvas.pixels(model, image)
        found = torch.cat(
            [
                similarity(one, pixels, [text], stride=canvas.stride, alone=alone)[0]
                for text, one, alone in columns
            ]
        )
        height, width = image.shape[:2]
        size = (max(1, round(height * min(1, KEPT / width))), min(width, KEPT))
        found = F.interpolate(found[None], size, mode="bilinear")[0]
        maps.append(found.cpu().numpy().astype(np.float16))
    least = np.min([m.min((1, 2)) for m in maps], 0).astype(float)
    most = np.max([m.max((1, 2)) for m in maps], 0).astype(float)
    titles = [f"{text} ({'vlm alone' if alone else 'fused'})" for text, _, alone in columns]
    if untrained is None:
        titles = list(texts)
    endings = _endings(titles)
    rows, entries = [], []
    for i, path, image in canvas.each("drawing", images):
        files, pictures = {}, []
        for k, title in enumerate(titles):
            drawn = Image.fromarray(draw.heat(maps[i][k].astype(float), least[k], most[k]))
            size = (image.shape[1], image.shape[0])
            pictures.append(np.asarray(drawn.resize(size, Image.Resampling.BILINEAR)))
            files[title] = canvas.save(pictures[k], f"{names[i]}.{endings[k]}.similarity.png")
        entries.append({"image": str(path), "pictures": files})
        rows.append(canvas.small([image, *pictures]))
    bars = [draw.scale_bar(least[k], most[k], canvas.width) for k in range(len(titles))]
    below = draw.beside([None, *bars], canvas.width)
    sheets = canvas.sheets("similarity", rows, ["image", *titles], names, lambda _: below)
    scales = {t: [round(least[k], 4), round(most[k], 4)] for k, t in enumerate(titles)}
    return {"sheets": sheets, "scales": scales, "images": entries}


def _endings(titles: Sequence[str]) -> list[str]:
    """Distinguishes the files: the words, and a number where these are not enough."""
    plain = [re.sub(r"[^\w]+", "-", title).strip("-")[:60] for title in titles]
    return [f"{p}-{k}" if plain.count(p) > 1 or not p else p for k, p in enumerate(plain)]


@dataclass(frozen=True)
class Labeled:
    """The samples of a dataset to draw beside their targets: `count` of them, evenly spaced."""

    dataset: Dataset
    count: int

    def indices(self) -> list[int]:
        count = min(self.count, len(self.dataset))
        return [int(i) for i in np.linspace(0, len(self.dataset) - 1, count, dtype=int)]


def compare(
    models: dict[str, tuple[DGSSModel, Inference]],
    images: Sequence[Path],
    canvas: Canvas,
    labeled: Labeled | None = None,
) -> dict[str, Any]:
    """Sheets of image, target (of `labeled`) and every model's prediction, with a legend.

    Classes go by name: each has one color, whatever its id in one model or the other. A model
    comes with the way in which it segments images.
    """
    for model, _ in models.values():
        names = canvas.look(model, images)
    classes = tuple(dict.fromkeys(c for model, _ in models.values() for c in model.classes))
    if len(classes) > 255:
        raise MFuserError(f"together the runs know {len(classes)} classes; a mask holds 255")
    table = draw.palette(classes)
    places = {
        name: np.array([classes.index(c) for c in model.classes])
        for name, (model, _) in models.items()
    }

    def colored(name: str, pixels: Tensor, size: tuple[int, ...]) -> np.ndarray:
        model, inference = models[name]
        scores = model.segment_by(inference, pixels.to(canvas.device))[0]
        return draw.color(places[name][predict_ids(scores, size)], table)

    rows: list[list[np.ndarray]] = []
    titles = ["image", *models]
    if labeled is not None:
        titles.insert(1, "target")
        mapped = ClassMap(labeled.dataset, classes)
        indices = labeled.indices()
        with canvas.console.task("segmenting", len(indices)) as task:
            for index in indices:
                sample = labeled.dataset[index]
                target = draw.color(mapped(sample.label, sample.name), table)
                shown = test_scale(sample.image, labeled.dataset.test_size)
                pixels = torch.from_numpy(shown).permute(2, 0, 1)[None]
                masks = [colored(name, pixels, target.shape[:2]) for name in models]
                rows.append(canvas.small([sample.image, target, *masks]))
                task.advance()
        names = [labeled.dataset.name(index) for index in indices]
    for _, _, image in canvas.each("segmenting", images):
        masks = [
            colored(name, canvas.pixels(model, image), image.shape[:2])
            for name, (model, _) in models.items()
        ]
        rows.append(canvas.small([image, *masks]))
    sheets = canvas.sheets("compare", rows, titles, names, lambda w: draw.legend(classes, table, w))
    return {"sheets": sheets, "images": list(names), "classes": list(classes)}
