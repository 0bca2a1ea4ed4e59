"""The speed of the dataset `streets`, and its picture.

python benchmarks/streets.py                            images per second, one and two processes
python benchmarks/streets.py --size 128 256             images of another size
python benchmarks/streets.py --json
python benchmarks/streets.py --classes                  how often each class occurs
python benchmarks/streets.py --picture docs/streets.png one row per domain, and the labels
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np

from mfuser.config.classes import CITYSCAPES
from mfuser_plugins.datasets.streets import StreetsSpec

DOMAINS = ("game", "camera", "fog", "night", "rain", "snow")
COLORS = np.zeros((256, 3), np.uint8)
COLORS[: len(CITYSCAPES.colors)] = CITYSCAPES.colors


def draw(domain: str, size: tuple[int, int], start: int, count: int) -> float:
    """CPU seconds per image of `size` (height, width), its label included."""
    dataset = StreetsSpec(domain=domain, size=size, count=start + count).build(None, "train")
    begin = time.process_time()
    for i in range(start, start + count):
        dataset[i]
    return (time.process_time() - begin) / count


def speed(domain: str, size: tuple[int, int], processes: int, count: int) -> tuple[float, float]:
    """Images per second, start-up excluded, and CPU seconds per image."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(draw, [(domain, size, 0, 2)] * processes, chunksize=1)
        start = time.perf_counter()
        each = count // processes
        used = pool.starmap(draw, [(domain, size, k * each, each) for k in range(processes)], 1)
        return each * processes / (time.perf_counter() - start), sum(used) / processes


def classes(domain: str, count: int) -> dict[str, tuple[float, float]]:
    """Class -> share of pixels, share of images with at least 0.05 % of their pixels in it."""
    dataset = StreetsSpec(domain=domain, count=count).build(None, "train")
    counts = np.stack([np.bincount(dataset.label(i).ravel(), minlength=256) for i in range(count)])
    shares = counts / counts.sum(1, keepdims=True)
    return {
        name: (float(shares[:, i].mean()), float((shares[:, i] > 5e-4).mean()))
        for i, name in enumerate(CITYSCAPES.names)
    }


def picture(path: Path, indices: list[int], height: int = 128) -> None:
    """Rows: game and its labels, then the shifted domains and theirs; drawn at twice the size."""
    from PIL import Image

    size = (2 * height, 4 * height)
    rows = []
    for domain in DOMAINS:
        dataset = StreetsSpec(domain=domain, size=size).build(None, "val")
        samples = [dataset[i] for i in indices]
        rows.append(np.array(Image.fromarray(np.hstack([s.image for s in samples])).reduce(2)))
        if domain in ("game", "snow"):
            rows.append(np.hstack([COLORS[s.label[::2, ::2]] for s in samples]))
    image = Image.fromarray(np.vstack(rows))
    # 256 colors: the noise of the camera rows would make a true-color PNG four times as large.
    few = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="figures for programs")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(256, 512), metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--count", type=int, default=60, help="images per measurement")
    parser.add_argument("--classes", action="store_true", help="class frequencies instead")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the picture instead")
    parser.add_argument("--indices", default="53,58,59,62,64", help="images of the picture")
    options = parser.parse_args()
    if options.picture:
        picture(options.picture, [int(i) for i in options.indices.split(",")])
        return
    if options.classes:
        tables = {domain: classes(domain, options.count) for domain in ("game", "camera")}
        if options.json:
            print(json.dumps(tables, indent=2))
            return
        print("class            game: pixels  images   shifted: pixels  images")
        for name in CITYSCAPES.names:
            (a, b), (c, d) = tables["game"][name], tables["camera"][name]
            print(f"{name:15} {a:13.2%} {b:8.0%} {c:16.2%} {d:8.0%}")
        return
    size = (options.size[0], options.size[1])
    figures = {}
    for domain in DOMAINS:
        (one, used), (two, _) = (speed(domain, size, n, options.count) for n in (1, 2))
        figures[domain] = {
            "images_per_second_1": one,
            "images_per_second_2": two,
            "processor_ms": 1000 * used,
        }
    if options.json:
        print(json.dumps({"size": size, "domains": figures}, indent=2))
        return
    # On a busy machine, compare the CPU time.
    heading = f"images per second at {size[0]}x{size[1]}"
    print(f"{heading:30} 1 process  2 processes        CPU ms/image")
    for domain, by in figures.items():
        one, two, used = by.values()
        print(f"{domain:28} {one:11.1f} {two:12.1f} {used:19.1f}")


if __name__ == "__main__":
    main()
