"""Training crops from PNG files: MFuser's loader beside a plain Pillow and torchvision one.

    python benchmarks/loader.py [--images 8] [--repeats 7] [--photos FOLDER] [--json FILE]

Crops of 512x512 from images of 2048x1024 (8-bit RGB) with labels (8-bit gray), one process, one
thread, batches of one; CPU seconds, since they hold on a machine that others use too. Both ways:
a factor from 0.5 to 2, a window, a flip half the time, changes of brightness, contrast, saturation
and hue, each half the time. The plain one does what torchvision's examples do (decode both files,
`v2.ScaleJitter`, `RandomCrop`, `RandomHorizontalFlip`, `RandomPhotometricDistort`), once on Pillow
images and once on uint8 tensors; the faster of the two counts. It knows no class share, so ours
leaves it out too; what it costs is a line of its own. Rounds of all ways take turns; medians.

--photos: JPEG or PNG photographs (below the folder) to make the images of, scaled up, with the
noise of a camera, so that a file has about the size that Cityscapes' and GTA's have (2.3 MB); else
streets are rendered. The files' size is printed: it decides how much decoding costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from mfuser.config.classes import CITYSCAPES
from mfuser.data import png
from mfuser.data.loading import ClassMap, CropSource, training_stream
from mfuser.data.sampling import ShuffledSampler
from mfuser.data.transforms import Augmentation, AugmentationSpec
from mfuser_plugins.datasets.folder import FolderSpec
from mfuser_plugins.datasets.streets import StreetsSpec

SIZE = (1024, 2048)
CROP = (512, 512)
NOISE = {True: 0.6, False: 1.0}
"""Standard deviation, in levels, of photographs and of rendered images: files of 2 to 2.5 MB."""


def write(root: Path, count: int, photos: Path | None) -> float:
    """Images and labels of the dataset `folder`; megabytes of an image on average."""
    rng = np.random.default_rng(0)
    rendered = StreetsSpec(domain="game", size=SIZE, count=count).build(None, "train")
    paths = sorted(p for p in photos.rglob("*.jpg")) if photos else []
    if photos and not paths:
        raise SystemExit(f"there is no *.jpg below {photos}")
    for name in ("images", "masks"):
        (root / name).mkdir()
    total = 0
    for k in range(count):
        sample = rendered[k]
        image = sample.image
        if paths:
            with Image.open(paths[k % len(paths)]) as photo:
                size = SIZE[::-1]
                image = np.asarray(photo.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        noisy = image + rng.normal(0, NOISE[bool(paths)], image.shape)
        path = root / "images" / f"{k}.png"
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(path)
        Image.fromarray(sample.label.astype(np.uint8)).save(root / "masks" / f"{k}.png")
        total += path.stat().st_size
    return total / count / 1e6


class Plain(TorchDataset[Any]):
    """What a training script of torchvision's does."""

    def __init__(self, root: Path, tensors: bool) -> None:
        self.pairs = [(p, root / "masks" / p.name) for p in sorted((root / "images").glob("*.png"))]
        self.tensors = tensors
        fill = {tv_tensors.Image: 0, Image.Image: 0, tv_tensors.Mask: 255}
        self.transform = v2.Compose(
            [
                v2.ScaleJitter(SIZE, (0.5, 2.0)),
                v2.RandomCrop(CROP, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomPhotometricDistort(p=0.5),
                v2.ToImage(),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, label = self.pairs[index]
        image: Any = Image.open(path).convert("RGB")
        if self.tensors:
            image = v2.functional.to_image(image)
        image, mask = self.transform(image, tv_tensors.Mask(np.array(Image.open(label))))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).long()


def ours(root: Path, count: int, share: float) -> Callable[[int], Iterator[object]]:
    """Round -> its batches."""
    dataset = FolderSpec(classes=CITYSCAPES.names).build(root, "train")
    source = CropSource(dataset, ClassMap(dataset, CITYSCAPES.names), ShuffledSampler(count))
    augmentation = Augmentation(AugmentationSpec(max_class_share=share), CROP)
    device = torch.device("cpu")

    def batches(turn: int) -> Iterator[object]:
        stream = training_stream([source], augmentation, seed=turn, steps=count, batch_size=1)
        return (batch.to(device) for batch in stream)

    return batches


def plain(root: Path, tensors: bool) -> Callable[[int], Iterator[object]]:
    def batches(turn: int) -> Iterator[object]:
        torch.manual_seed(turn)
        return iter(DataLoader(Plain(root, tensors), batch_size=1, shuffle=True))

    return batches


def decoding(root: Path) -> dict[str, Callable[[int], Iterator[object]]]:
    paths = sorted((root / "images").glob("*.png"))

    def whole(path: Path) -> object:
        stored = png.opened(path.read_bytes())
        return stored and stored.rgb(slice(0, SIZE[0]), slice(0, SIZE[1]))

    return {
        "the image alone, by Pillow": lambda _: (np.array(Image.open(p)) for p in paths),
        "the image alone, whole, by ours": lambda _: (whole(p) for p in paths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write(root, args.images, args.photos)
        ways = {
            "ours": ours(root, args.images, 1.0),
            "ours, with the class share": ours(root, args.images, 0.75),
            "plain, Pillow images": plain(root, tensors=False),
            "plain, tensors": plain(root, tensors=True),
            **decoding(root),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.repeats + 1):
            for name, way in ways.items():
                begun = time.process_time()
                seen = sum(1 for _ in way(turn))
                if turn:  # the first warms up
                    seconds[name].append((time.process_time() - begun) / seen)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(medians[name] for name in medians if name.startswith("plain"))
    result = {
        "image_megabytes": round(size, 2),
        "inflater": png.inflater.__name__,
        "milliseconds": {name: round(1e3 * value, 1) for name, value in medians.items()},
        "times_as_fast": round(best / medians["ours"], 2),
        "with_the_class_share": round(best / medians["ours, with the class share"], 2),
    }
    print(f"files of {result['image_megabytes']} MB, inflated by {result['inflater']}")
    for name, value in medians.items():
        print(f"{name:32s} {1e3 * value:6.1f} ms a crop")
    print(f"ours is {result['times_as_fast']} times as fast as the faster plain pipeline")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
