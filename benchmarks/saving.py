"""What a checkpoint costs the training that it is written beside: docs/scale.md states what this
prints.

    python benchmarks/saving.py [--gb 1.4] [--folder .]

Trained weights and both moments of the optimizer of so many gigabytes together, as those of the
paper's pairing: seconds of the copy that a training waits for, seconds of the write that it does
not, and the memory that both take, on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from mfuser.engine import checkpoints
from mfuser.engine.checkpoints import Checkpoint
from mfuser.engine.saving import copied

TENSORS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.4)
    parser.add_argument("--folder", type=Path, default=Path("."))
    given = parser.parse_args()
    torch.set_num_threads(1)
    size = int(given.gb * 1e9 / 3 / 4 / TENSORS)
    model = {f"m{k}": torch.randn(size) for k in range(TENSORS)}
    moments = ("exp_avg", "exp_avg_sq")
    optimizer = {f"{name}.m{k}": torch.randn(size) for name in moments for k in range(TENSORS)}
    process = psutil.Process()
    before, highest, done = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    state, moved = copied(model), copied(optimizer)
    copy = time.perf_counter() - begun
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        begun = time.perf_counter()
        meta = {"step": 1, "pairing": {}, "run": {}}
        checkpoints.write_last(Path(folder), Checkpoint(state, moved, meta))
        write = time.perf_counter() - begun
    done.set()
    watcher.join()
    print(
        f"{given.gb} GB: copied in {copy:.2f} s, written in {write:.2f} s, "
        f"{(highest[0] - before) / 1e9:.2f} GB of memory meanwhile"
    )


if __name__ == "__main__":
    main()
