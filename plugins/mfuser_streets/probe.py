"""Measures frozen towers: probes on their features, and the words of mini-vlm on its patches.

A probe is trained on the source alone and scored on domains it never sees. Features are computed
once, so that many probes cost little more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser.errors import WeightsError
from mfuser.reporting.pca import Components
from mfuser_streets import towers
from mfuser_streets.pretrain.losses import PROMPT, prepare, start
from mfuser_streets.pretrain.run import tokenizer
from mfuser_streets.world import space
from mfuser_streets.world.captions import CLASSES

TARGETS = tuple(space.TARGETS)
GRID = (towers.SIZE[0] // 8, towers.SIZE[1] // 8)
Head = Literal["linear", "mlp"]
_CELLS = 4
"""A patch of 8 pixels is labeled at 4x4 places."""
_MIDDLE = towers.DEPTH // 2 - 1


@dataclass
class Pictures:
    """images: uint8 (n, H, W, 3). labels: uint8 (n, H, W)."""

    images: np.ndarray
    labels: np.ndarray


def pictures(domain: str, split: str, count: int) -> Pictures:
    """The first images of a domain, as the dataset `streets` gives them with seed 0."""
    from mfuser_plugins.datasets.streets import StreetsSpec

    spec = StreetsSpec.model_validate({"domain": domain, "size": towers.SIZE, "count": count})
    data = spec.build(None, split)
    samples = [data[i] for i in range(count)]
    return Pictures(
        np.stack([s.image for s in samples]),
        np.stack([s.label for s in samples]).astype(np.uint8),
    )


def tower(which: str, weights: Path | None = None) -> Any:
    """A vision transformer: of "vfm" or "vlm" with shipped or given weights, or "random"."""
    import timm

    torch.manual_seed(0)
    vit = timm.create_model(towers.VFM_MODEL)
    if which == "random":
        start(vit)
        return vit.eval()
    if which == "vlm":
        return clip(weights).visual.trunk.eval()
    _load(vit, weights or towers.shipped(towers.FOLDER / f"{towers.VFM}.safetensors"))
    return vit.eval()


def clip(weights: Path | None = None) -> Any:
    """mini-vlm with shipped or given weights."""
    import open_clip

    towers.register()
    cfg = open_clip.get_model_config(towers.VLM)
    assert cfg is not None
    model = open_clip.CLIP(**cfg)
    _load(model, weights or towers.shipped(towers.FOLDER / f"{towers.VLM}.safetensors"))
    return model.eval()


def _load(model: nn.Module, path: Path) -> None:
    """Weights of a finished or running pretraining. Raises WeightsError."""
    from safetensors.torch import load_file

    towers.check_world(path)
    try:
        if path.suffix == ".pt":
            saved = torch.load(path, weights_only=True)["model"]
            tensors = {
                k.removeprefix("tower."): v for k, v in saved.items() if k.startswith("tower.")
            }
        else:
            tensors = load_file(path)
        model.load_state_dict(tensors)
    except Exception as error:
        raise WeightsError(
            f"{path} does not fit {type(model).__name__}: give the .safetensors file or the "
            f"pretraining.pt of a pretraining ({type(error).__name__})"
        ) from error


@torch.no_grad()
def features(vit: Any, images: np.ndarray, batch: int = 32) -> Tensor:
    """float16 (n, patches, 2 * width): the middle block's tokens and the last one's, normed."""
    found = []
    for i in range(0, len(images), batch):
        x = vit.patch_embed(prepare(images[i : i + batch])) + vit.pos_embed
        with torch.autocast("cpu", torch.bfloat16):
            for k, block in enumerate(vit.blocks):
                x = block(x)
                if k == _MIDDLE:
                    middle = F.layer_norm(x.float(), x.shape[-1:])
        found.append(torch.cat([middle, F.layer_norm(x.float(), x.shape[-1:])], -1).half())
    return torch.cat(found)


class Probe(nn.Module):
    """One linear map, or two with a GELU between, from a patch's features to its 4x4 labels."""

    def __init__(self, width: int, head: Head) -> None:
        super().__init__()
        out = len(CLASSES) * _CELLS**2
        self.map = (
            nn.Linear(width, out)
            if head == "linear"
            else nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, patches, width) -> logits (B, classes, 4 * h, 4 * w)."""
        h, w = GRID
        y = self.map(x).reshape(len(x), h, w, len(CLASSES), _CELLS, _CELLS)
        return y.permute(0, 3, 1, 4, 2, 5).reshape(len(x), len(CLASSES), h * _CELLS, w * _CELLS)


def class_weights(labels: np.ndarray) -> Tensor:
    """(classes,): frequency to the power -0.35, so that small things count."""
    share = np.bincount(labels.ravel(), minlength=256)[: len(CLASSES)] / labels.size
    weights = (share + 1e-4) ** -0.35
    return torch.tensor(weights / (weights * share).sum(), dtype=torch.float32)


def train_probe(
    x: Tensor, labels: np.ndarray, head: Head, seed: int, steps: int = 600, batch: int = 16
) -> Probe:
    """A probe on cached features (n, patches, width)."""
    torch.manual_seed(seed)
    probe = Probe(x.shape[-1], head)
    small = torch.from_numpy(labels[:, ::2, ::2].astype(np.int64))
    weights = class_weights(labels)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        chosen = torch.randint(0, len(x), (batch,))
        loss = F.cross_entropy(
            probe(x[chosen].float()), small[chosen], weight=weights, ignore_index=255
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe.eval()


def confusion(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes): rows what is there, columns what is said."""
    n = len(CLASSES)
    known = labels < n
    pairs = labels[known].astype(np.int64) * n + predicted[known]
    return np.bincount(pairs, minlength=n * n).reshape(n, n)


def miou(table: np.ndarray) -> float:
    """Mean over the classes that are there, in per cent."""
    hit = np.diag(table)
    union = table.sum(0) + table.sum(1) - hit
    return float(100 * np.mean(hit[union > 0] / union[union > 0]))


@torch.no_grad()
def predict(probe: Probe, x: Tensor, batch: int = 32) -> np.ndarray:
    """uint8 (n, H, W)."""
    found = [
        F.interpolate(probe(x[i : i + batch].float()), towers.SIZE, mode="bilinear").argmax(1)
        for i in range(0, len(x), batch)
    ]
    return torch.cat(found).numpy().astype(np.uint8)


def oracle(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per pixel whichever of two predictions is right: what a perfect choice would reach."""
    return np.where(first == labels, first, second)


def from_scratch(
    train: Pictures, tests: dict[str, Pictures], seed: int, steps: int, batch: int = 16
) -> dict[str, float]:
    """mIoU by domain of the same ViT and an MLP, trained end to end on the source alone."""
    import timm

    torch.manual_seed(seed)
    vit: Any = timm.create_model(towers.VFM_MODEL)
    start(vit)
    for block in vit.blocks:
        block.attn.fused_attn = False
    probe = Probe(2 * towers.WIDTH, "mlp")
    both = [*vit.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(both, lr=1e-3, weight_decay=0.05)
    weights = class_weights(train.labels)
    generator = np.random.default_rng(seed)
    for step in range(steps):
        rate = 1e-3 * min(1, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = generator.integers(0, len(train.images), batch)
        flip = slice(None, None, -1 if generator.random() < 0.5 else 1)
        images = prepare(train.images[chosen][:, :, flip])
        labels = torch.from_numpy(train.labels[chosen][:, ::2, ::2][:, :, flip].astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = probe(_taps(vit, images))
        loss = F.cross_entropy(logits.float(), labels, weight=weights, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both, 1.0)
        optimizer.step()
    vit.eval()
    return {
        name: miou(confusion(predict(probe, features(vit, p.images)), p.labels))
        for name, p in tests.items()
    }


def _taps(vit: Any, images: Tensor) -> Tensor:
    x = vit.patch_embed(images) + vit.pos_embed
    for k, block in enumerate(vit.blocks):
        x = block(x)
        if k == _MIDDLE:
            middle = F.layer_norm(x, x.shape[-1:])
    return torch.cat([middle, F.layer_norm(x, x.shape[-1:])], -1)


@torch.no_grad()
def word_maps(model: Any, images: np.ndarray, batch: int = 32) -> Tensor:
    """(n, patches, classes): cosine between each patch and each class word."""
    words = tokenizer()
    length = model.context_length
    text = F.normalize(
        model.encode_text(words([PROMPT.format(c) for c in CLASSES], length)).float(), dim=-1
    )
    maps = []
    for i in range(0, len(images), batch):
        trunk = model.visual.trunk
        x = trunk.patch_embed(prepare(images[i : i + batch])) + trunk.pos_embed
        with torch.autocast("cpu", torch.bfloat16):
            for block in trunk.blocks:
                x = block(x)
            dense = model.visual.head(trunk.norm(x)).float()
        maps.append(F.normalize(dense, dim=-1) @ text.t())
    return torch.cat(maps)


def word_aucs(maps: Tensor, labels: np.ndarray, share: float = 0.3) -> dict[str, float]:
    """Class -> area under the ROC curve of its word over patches: whether a patch that the class
    covers to `share` or more is nearer to the word than one it covers less. Classes that cover
    no patch so far are left out."""
    n, (h, w) = len(labels), GRID
    cells = labels.reshape(n, h, 8, w, 8).transpose(0, 1, 3, 2, 4).reshape(n * h * w, 64)
    found = {}
    for c, name in enumerate(CLASSES):
        there = (cells == c).mean(1) >= share
        if not 5 <= there.sum() < len(there):
            continue
        ranks = np.empty(len(there))
        ranks[maps[..., c].reshape(-1).numpy().argsort()] = np.arange(len(there))
        k = there.sum()
        found[name] = float((ranks[there].sum() - k * (k - 1) / 2) / (k * (len(there) - k)))
    return found


def pca(x: Tensor, seen: Tensor | None = None) -> np.ndarray:
    """uint8 (n, h, w, 3): features projected on the three main directions of `seen`."""
    components = Components.of((x if seen is None else seen).reshape(-1, x.shape[-1]))
    low = components.project(x)
    spread = low.reshape(-1, 3).std(0)
    return components.colors(low, spread).reshape(len(x), *GRID, 3)


def averaged(by_domain: dict[str, float], names: Sequence[str] = TARGETS) -> float:
    return float(np.mean([by_domain[n] for n in names]))
