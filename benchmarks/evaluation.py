"""Evaluation with threads ahead, and a large frame against the released way: docs/scale.md.

    python benchmarks/evaluation.py ahead RUN [--frames 200]      workers 1 against 0, and memory
    python benchmarks/evaluation.py frame RUN [--size 1024 2048]  windows of one frame, and its mask
    python benchmarks/evaluation.py pairing NAME                  the same for random weights: time

RUN is a trained run, such as that of `make demo`. `ahead` evaluates it on frames of 1280x720 that
lie on disk as PNG, drawn by `streets`; --fit is the size that the model is given. One thread of
torch. What is compared runs in one process and in turns; figures are medians. Check the load of the
machine first (`uptime`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mfuser
from mfuser import Dataset
from mfuser.config.classes import CITYSCAPES
from mfuser.config.compilation import CompileSpec
from mfuser.config.run import domains
from mfuser.engine import run as engine
from mfuser.engine.checkpoints import load_model
from mfuser.engine.compiling import compile_parts
from mfuser.engine.environment import environment
from mfuser.model.assembly import random_model
from mfuser.model.dgss import DGSSModel, evaluating
from mfuser.model.sliding_window import sliding_window

FRAME = (720, 1280)
DRAWN = 20
"""Frames that differ; the others are links to them."""
SCAN = "MFUSER_SCAN_BACKEND"


def drawn(size: tuple[int, int], count: int) -> Dataset:
    """Scenes of the source of the demo in any size."""
    shown = f'[dataset.drawn]\nname = "streets"\nsize = {list(size)}\ncount = {count}\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.toml"
        path.write_text(shown, "utf-8")
        registry = mfuser.load_registry(path)
        return domains(registry, "drawn")[0].build(registry, "val")


def write_frames(folder: Path, count: int) -> None:
    """images/ and masks/ as PNG."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    scenes = drawn(FRAME, DRAWN)
    noise = np.random.default_rng(0)
    for k in range(count):
        names = [folder / part / f"{k:04d}.png" for part in ("images", "masks")]
        if k < DRAWN:
            sample = scenes[k]
            # A sensor's noise, without which a drawn frame is decoded faster than a photograph.
            grains = noise.normal(0, 2, sample.image.shape).round()
            image = np.clip(sample.image + grains, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(names[0])
            Image.fromarray(sample.label.astype(np.uint8)).save(names[1])
        else:
            for name, part in zip(names, ("images", "masks"), strict=True):
                os.link(folder / part / f"{k % DRAWN:04d}.png", name)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def watched() -> Iterator[list[int]]:
    """Memory every fifth of a second."""
    seen: list[int] = []
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.2):
            seen.append(resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join()


def measured_ahead(
    run: Path,
    frames: int,
    fit: tuple[int, int],
    repeats: int,
    workers: list[int],
    settings: list[str],
) -> dict[str, Any]:
    """Seconds of whole evaluations (reading the run included) by workers, and the share of the
    processor's time that other threads than the main one took: a busy machine does not change it.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_frames(folder / "frames", frames)
        registry_file = folder / "registry.toml"
        registry_file.write_text(
            f'[dataset.frames]\nname = "folder"\nclasses = {json.dumps(CITYSCAPES.names)}\n'
            f"split = 'train'\ntest_size = {list(fit)}\n[data]\nframes = '{folder / 'frames'}'\n",
            "utf-8",
        )
        registry = mfuser.load_registry(registry_file)
        targets = domains(registry, "frames")
        seconds: dict[int, list[float]] = {n: [] for n in workers}
        memory: dict[int, list[list[int]]] = {n: [] for n in workers}
        beside: dict[int, list[float]] = {n: [] for n in workers}
        results = []
        for _ in range(repeats):
            for count in workers:
                begun = time.perf_counter()
                all_threads, this = time.process_time(), time.thread_time()
                with watched() as seen:
                    done = engine.evaluate(
                        run,
                        registry=registry,
                        targets=targets,
                        settings=settings,
                        out=folder / "out",
                        device="cpu",
                        limit=frames,
                        workers=count,
                        quiet=True,
                    )
                seconds[count].append(time.perf_counter() - begun)
                memory[count].append(seen)
                spent = time.process_time() - all_threads
                beside[count].append(1 - (time.thread_time() - this) / spent)
                results.append(done.report.domains["frames"].model_dump(mode="json"))
        median = {n: statistics.median(values) for n, values in seconds.items()}
        return {
            "frames": frames,
            "read_in": f"{fit[0]}x{fit[1]}",
            "seconds": seconds,
            "ratios": {n: median[workers[0]] / median[n] for n in workers},
            "beside_the_main_thread": beside,
            "megabytes": {n: [_quarters(one) for one in runs] for n, runs in memory.items()},
            "same": all(result == results[0] for result in results),
        }


def _quarters(seen: list[int]) -> list[int]:
    """The most memory in each quarter of the time."""
    return [round(max(part) / 1e6) for part in np.array_split(seen, 4) if len(part)]


def measured_frame(
    model: DGSSModel,
    image: Tensor,
    repeats: int,
    batches: list[int],
    device: str,
    compiled: bool,
) -> list[dict[str, Any]]:
    """Seconds of one image (1, 3, H, W) by ways to segment it, the released one first."""
    image = image.to(device)
    model.to(device).eval()

    def released() -> Tensor:
        """One window at a time, the texts computed for each, the reference scan."""
        with environment({SCAN: "reference"}), evaluating(model):
            return sliding_window(model.scores, image, model.spec.image_size, None, 1)

    def ours(batch: int) -> Callable[[], Tensor]:
        return lambda: model.segment(image, window_batch=batch)

    def half(batch: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model.segment(image, window_batch=batch)

    ways: list[tuple[str, Callable[[], Tensor]]] = [("released way, float32", released)]
    ways += [(f"float32, {n} windows at once", ours(n)) for n in batches]
    ways += [(f"bfloat16 autocast, {n} windows at once", partial(half, n)) for n in batches]
    rows = _rounds(ways, repeats)
    if compiled:
        compile_parts(model, CompileSpec(), print)
        ways = [(f"compiled, {n} windows at once", ours(n)) for n in batches]
        ways += [(f"compiled, bfloat16 autocast, {n} windows", partial(half, n)) for n in batches]
        rows += _rounds(ways, repeats)
    first = rows[0]
    for row in rows:
        row["ratio"] = first["seconds"] / row["seconds"]
        same = (row["mask"] == first["mask"]).float().mean()
        row["equal_pixels"] = float(same)
    for row in rows:
        del row["mask"]
    return rows


def _rounds(ways: list[tuple[str, Callable[[], Tensor]]], repeats: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name, _ in ways}
    masks, first = {}, {}
    for name, way in ways:  # kernels are compiled, caches filled
        begun = time.perf_counter()
        masks[name] = way().argmax(1)
        first[name] = time.perf_counter() - begun
    for _ in range(repeats):
        for name, way in ways:
            begun = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    return [
        {"way": n, "seconds": statistics.median(s), "first": first[n], "mask": masks[n]}
        for n, s in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["ahead", "frame", "pairing"])
    parser.add_argument("of", help="a run's folder, or the name of a pairing")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--fit", type=int, nargs=2, default=(256, 144), metavar=("W", "H"))
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], help="e.g. vlm.weights=PATH")
    parser.add_argument("--compile", action="store_true", help="also by torch.compile")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size = (given.size[0], given.size[1])
    found: Any
    if given.what == "ahead":
        fit = (given.fit[0], given.fit[1])
        found = measured_ahead(
            Path(given.of), given.frames, fit, given.repeats, given.workers, given.set
        )
    elif given.what == "frame":
        model, _ = load_model(Path(given.of), mfuser.load_registry(), given.set)
        image = torch.from_numpy(drawn(size, 1)[0].image).permute(2, 0, 1)[None]
        found = measured_frame(
            model, image, given.repeats, given.batches, given.device, given.compile
        )
    else:
        model = random_model(mfuser.load_registry().pairing(given.of))
        image = torch.rand(1, 3, *size)
        found = measured_frame(
            model, image, given.repeats, given.batches, given.device, given.compile
        )
        for row in found:
            del row["equal_pixels"]  # of random weights it says nothing
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
