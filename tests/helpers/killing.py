"""Kills training, evaluation and prediction at random moments and sees what is left.

    OMP_NUM_THREADS=1 python tests/helpers/killing.py --kills 200 --minutes 20

One process imports torch and forks every attempt, so that two hundred take minutes. A run is lost
if it cannot be finished afterwards; its weights, its log and its report must be those of a run that
nobody killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from mfuser.cli import main as command
from mfuser.engine import checkpoints

STEPS = 6
TRAIN = ("train", "plain", "--recipe", "tiny", "--device", "cpu", "--set-recipe")
RECIPE = f"steps={STEPS}", "--set-recipe", "save_every=1", "--set-recipe"


@dataclass
class Tally:
    """kills: by command. lost: why a run could not be finished. wrong: what a finished run, or
    what a kill left, had that it should not have."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        kills = ", ".join(f"{n} of {name}" for name, n in sorted(self.kills.items()))
        lines = [
            f"{self.kills.total()} kills ({kills}) of {self.runs.total()} runs in "
            f"{self.seconds:.0f} s: {len(self.lost)} lost, {len(self.wrong)} wrong"
        ]
        return "\n".join([*lines, *self.lost, *self.wrong])


class Killing:
    """registry: a file with the pairing `plain` and the recipe `tiny`. folder: for everything.
    each: kills of one run at the most, which is then left to finish."""

    def __init__(self, registry: Path, folder: Path, seed: int = 0, each: int = 5) -> None:
        self.registry, self.folder, self.each = registry, folder, each
        self.random = random.Random(seed)
        self.tally = Tally()
        self.durations: dict[str, float] = {}
        cv2.setNumThreads(1)  # its threads do not outlive a fork, and it waits for them
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        pixels = np.random.default_rng(0)
        for i in range(4):
            picture = pixels.integers(0, 255, (64, 96, 3), np.uint8)
            Image.fromarray(picture).save(self.images / f"{i}.png")
        self.run, self.report, self.masks = (folder / f"whole-{n}" for n in "tep")
        for name, out in (("train", self.run), ("evaluate", self.report), ("predict", self.masks)):
            self._whole(name, self._arguments(name, out))
        self.weights = checkpoints.read(self.run / checkpoints.FINAL).model
        self.log = _steps(self.run)

    def until(self, kills: int, seconds: float) -> Tally:
        """At most so many kills and so long; what is begun is finished."""
        begun = time.monotonic()
        number = 0
        while self.tally.kills.total() < kills and time.monotonic() - begun < seconds:
            name = ("train", "train", "evaluate", "predict")[number % 4]
            checks = {"train": self._trained, "evaluate": self._scored, "predict": self._masked}
            number += 1
            self._one(name, self.folder / f"{name}-{number}", checks[name], kills)
        self.tally.seconds = time.monotonic() - begun
        return self.tally

    def _one(
        self, name: str, out: Path, check: Callable[[Path, bool], list[str]], kills: int
    ) -> None:
        killed = 0
        workers = str(int(self.random.random() < 0.2))
        while True:
            spare = killed >= self.each or self.tally.kills.total() >= kills
            after = None if spare else self.random.uniform(0, self.durations[name])
            code, said = self._attempt(name, self._arguments(name, out, workers), after)
            if code == -9 and after is not None:
                killed += 1
                self.tally.kills[name] += 1
                self.tally.wrong += [f"{out} left after a kill: {w}" for w in check(out, False)]
                continue
            self.tally.runs[name] += 1
            if code != 0:
                self.tally.lost.append(f"{out}: exit code {code}: {said.strip()[-300:]}")
            else:
                self.tally.wrong += [f"{out}, finished: {w}" for w in check(out, True)]
            return

    def _arguments(self, name: str, out: Path, workers: str = "0") -> list[str]:
        tail = ["--registry", str(self.registry), "--out", str(out)]
        if name == "train":
            resume = ["--resume"] if (out / "run.json").is_file() else []
            return [*TRAIN, *RECIPE, f"workers={workers}", *tail, *resume]
        if name == "evaluate":
            return ["evaluate", str(self.run), "--device", "cpu", *tail]
        return ["predict", str(self.run), str(self.images), "--device", "cpu", *tail]

    def _whole(self, name: str, arguments: list[str]) -> None:
        for _ in range(2):  # the second is as long as those to come: nothing is read anew
            code, said = self._attempt(name, arguments, None)
            if code != 0:
                raise RuntimeError(f"{name} fails without any kill: {said}")
            if name == "train":
                break

    def _attempt(self, name: str, arguments: list[str], after: float | None) -> tuple[int, str]:
        words = self.folder / "said"

        def work() -> None:
            sys.settrace(None)  # coverage of the children is not kept
            file = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            torch.set_num_threads(1)
            try:
                command(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()

        process = multiprocessing.get_context("fork").Process(target=work)
        begun = time.monotonic()
        process.start()
        process.join(after)
        if process.is_alive():
            process.kill()
        process.join()
        if process.exitcode == 0:
            self.durations[name] = time.monotonic() - begun
        return process.exitcode or 0, words.read_text("utf-8", "replace")

    def _trained(self, out: Path, finished: bool) -> list[str]:
        wrong = [f"{p.name} is damaged" for p in out.glob("damaged-*")]
        for path in out.glob("[!.]*.safetensors"):
            try:
                checkpoints.read(path)
            except checkpoints.CheckpointError as error:
                wrong.append(str(error))
        if not finished:
            return wrong
        final = checkpoints.read(out / checkpoints.FINAL).model
        if not all(torch.equal(self.weights[k], final[k]) for k in self.weights):
            wrong.append("other weights")
        if _steps(out) != self.log:
            wrong.append(f"the log holds steps {_steps(out)}, not {self.log}")
        if _json(out / "report.json") != _json(self.run / "report.json"):
            wrong.append("another report")
        return wrong + _leftovers(out)

    def _scored(self, out: Path, finished: bool) -> list[str]:
        wrong = []
        for picture in out.glob("pictures/[!.]*.png"):
            wrong += _broken(picture)
        if (out / "report.json").is_file() and _json(out / "report.json") != _json(
            self.report / "report.json"
        ):
            wrong.append("another report")
        return wrong + (_leftovers(out) if finished else [])

    def _masked(self, out: Path, finished: bool) -> list[str]:
        wrong = []
        for mask in out.glob("[!.]*.mask.png"):
            wrong += _broken(mask)
            wrong += _broken(mask.with_name(mask.name.replace(".mask.", ".overlay.")))
            if mask.read_bytes() != (self.masks / mask.name).read_bytes():
                wrong.append(f"{mask.name} differs")
        if finished and {p.name for p in out.iterdir()} != {p.name for p in self.masks.iterdir()}:
            wrong.append(f"it holds {sorted(p.name for p in out.iterdir())}")
        return wrong


def _steps(folder: Path) -> list[int]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def _json(path: Path) -> object:
    return json.loads(path.read_text("utf-8"))


def _broken(picture: Path) -> list[str]:
    try:
        with Image.open(picture) as image:
            image.load()
        return []
    except OSError as error:
        return [f"{picture.name}: {error}"]


def _leftovers(folder: Path) -> list[str]:
    return [f"{p.name} was left behind" for p in folder.rglob(".*.tmp")]


if __name__ == "__main__":
    import argparse
    import tempfile

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from conftest import TINY

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        registry = Path(place) / "registry.toml"
        registry.write_text(TINY, "utf-8")
        os.chdir(place)
        killing = Killing(registry, Path(place) / "work", given.seed)
        tally = killing.until(given.kills, 60 * given.minutes)
    print(tally)
    sys.exit(bool(tally.lost or tally.wrong or tally.kills.total() < given.kills))
