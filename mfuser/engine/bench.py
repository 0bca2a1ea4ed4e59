"""Measures a pairing on this machine, part by part, and projects the cost of a recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfuser.config.pairing import PairingSpec
from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec
from mfuser.data.images import UnreadableImage
from mfuser.data.loading import unread
from mfuser.data.sampling import Mixture
from mfuser.data.transforms import Augmentation
from mfuser.engine.environment import environment
from mfuser.engine.memory import make_ready
from mfuser.engine.optimizer import parameter_groups
from mfuser.engine.precision import DTYPES
from mfuser.engine.stopwatch import OTHER, Stopwatch, modules_of, watch_model
from mfuser.errors import DataError, MFuserError
from mfuser.model.assembly import random_model
from mfuser.model.dgss import DGSSModel, evaluating
from mfuser.model.sliding_window import sliding_window
from mfuser.reporting.adapter_cost import machine
from mfuser.reporting.bench import Bench, DryRun, Inference, PartCost
from mfuser.reporting.compatibility import speed

SCAN = "MFUSER_SCAN_BACKEND"
"""Environment variable that fixes the implementation of the selective scan."""


def bench(
    spec: PairingSpec,
    recipe: RecipeSpec,
    *,
    pairing: str = "",
    recipe_name: str = "",
    device: str = "cpu",
    repeats: int = 3,
    frame: tuple[int, int] | None = None,
    released: bool = True,
    source: Callable[[], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Bench:
    """Measure training steps and, with `frame` (height, width), the segmentation of an image.

    Weights are random: nothing is downloaded, and time does not depend on them. released: also
    segment as the released code does. source: reads the crops of one step, for the time of data.

    Raises MFuserError for a pairing in which nothing trains, or a frame below the image size.
    """
    tell = say or (lambda _: None)
    model = random_model(spec)
    for line in make_ready(model, recipe, torch.device(device)):
        tell(line)
    if recipe.compile is not None:
        tell("compile: left out, since nobody can look at a clock inside compiled code")
    model.to(device)
    watch = Stopwatch(torch.device(device))
    size = spec.image_size
    if frame is not None and (frame[0] < size[0] or frame[1] < size[1]):
        raise MFuserError(
            f"a frame of {frame[0]}x{frame[1]} is below the window of {size[0]}x{size[1]}"
        )
    images = torch.rand(recipe.batch_size, 3, *size, device=device)
    labels = torch.randint(0, len(model.classes), (recipe.batch_size, *size), device=device)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr)
    tell(f"laid out {pairing}; measuring the peak of {device}")
    peak = 1e9 * speed(device, DTYPES.get(recipe.precision, torch.float32))
    inference = None
    if frame is not None:
        tell(f"segmenting {frame[0]}x{frame[1]}")
        inference = _inference(model, frame, device, recipe, repeats, released)
    parts = watch_model(model, watch)
    of_image = _timed_image(model, watch, frame, device, recipe) if frame is not None else {}
    _step(model, watch, optimizer, images, labels, recipe)  # compiles, and fills caches
    watch.seconds.clear()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = []
    for k in range(repeats):
        tell(f"step {k + 1} of {repeats}")
        steps.append(_step(model, watch, optimizer, images, labels, recipe))
    most = torch.cuda.max_memory_allocated() if device == "cuda" else None
    tell("counting FLOPs")
    with watch.counting():
        timed = dict(watch.seconds)
        _pass(model, watch, images, labels, recipe)
    optimizer.zero_grad(set_to_none=True)
    seconds = statistics.median(steps)
    scale = seconds / sum(steps)
    costs = [_part(model, part, watch, timed, scale, peak, of_image) for part in (*parts, OTHER)]
    data = _data_seconds(source) if source is not None else None
    return Bench(
        pairing=pairing,
        image_size=size,
        batch=recipe.batch_size,
        precision=recipe.precision,
        checkpointing=model.encoder.checkpointing,
        machine=machine(device),
        peak_flops=peak,
        repeats=repeats,
        seconds=seconds,
        peak_bytes=most,
        optimizer=scale * timed.get(("optimizer", OTHER), 0.0),
        data=data,
        parts=costs,
        inference=inference,
        dry_run=_dry_run(
            model, optimizer, recipe, recipe_name, _paced(seconds, data, recipe), watch
        ),
    )


def data_of(registry: Registry, run: RunSpec) -> Callable[[], None] | None:
    """Reads and crops the images of one step, in this process; None where the source is not
    here."""
    try:
        datasets = [source.build(registry, "train") for source in run.sources]
    except (DataError, UnreadableImage):
        return None
    augment = Augmentation(run.recipe.augmentation, run.pairing.image_size)
    mixture = Mixture([source.share for source in run.sources], run.seed)

    def read() -> None:
        for k in range(run.recipe.batch_size):
            source, position = mixture.at(k)
            image, label, _ = unread(datasets[source], position % len(datasets[source]))
            augment(image, label, np.random.default_rng(k))

    return read


def _autocast(device: str, precision: str) -> Any:
    if precision not in DTYPES:
        return nullcontext()
    return torch.autocast(device, DTYPES[precision])


def _pass(
    model: DGSSModel, watch: Stopwatch, images: Tensor, labels: Tensor, recipe: RecipeSpec
) -> None:
    model.train()
    with watch.during("forward"), _autocast(watch.device.type, recipe.precision):
        losses: Any = model(images, labels)
        total = torch.stack(list(losses.values())).sum()
    with watch.during("backward"):
        total.backward()


def _step(
    model: DGSSModel,
    watch: Stopwatch,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    recipe: RecipeSpec,
) -> float:
    """One training step; its seconds."""
    before = sum(watch.seconds.values())
    _pass(model, watch, images, labels, recipe)
    with watch.during("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sum(watch.seconds.values()) - before


def _part(
    model: DGSSModel,
    part: str,
    watch: Stopwatch,
    timed: dict[tuple[str, str], float],
    scale: float,
    peak: float,
    of_image: dict[str, float],
) -> PartCost:
    forward, backward = (scale * timed.get((phase, part), 0.0) for phase in ("forward", "backward"))
    flops = watch.flops["forward", part] + watch.flops["backward", part]
    parameters = {p for module in modules_of(model, part) for p in module.parameters()}
    if part == "mask decoder":
        parameters -= {p for m in modules_of(model, "pixel decoder") for p in m.parameters()}
    busy = forward + backward
    return PartCost(
        part=part,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        forward=forward,
        backward=backward,
        flops=flops,
        saved_bytes=watch.saved[part],
        of_peak=flops / busy / peak if flops and busy else None,
        inference=of_image.get(part),
    )


def _timed_image(
    model: DGSSModel, watch: Stopwatch, frame: tuple[int, int], device: str, recipe: RecipeSpec
) -> dict[str, float]:
    """Seconds of one image by part."""
    image = torch.rand(1, 3, *frame, device=device)
    with watch.during("image"), _autocast(device, recipe.precision):
        model.segment(image)
    return {part: s for (phase, part), s in watch.seconds.items() if phase == "image"}


def _inference(
    model: DGSSModel,
    frame: tuple[int, int],
    device: str,
    recipe: RecipeSpec,
    repeats: int,
    released: bool,
) -> Inference:
    image = torch.rand(1, 3, *frame, device=device)
    watch = Stopwatch(torch.device(device))

    def seconds(work: Callable[[], object]) -> float:
        return statistics.median(watch.timed("image", work) for _ in range(repeats))

    def ours() -> None:
        with _autocast(device, recipe.precision):
            model.segment(image)

    ours()  # kernels are compiled, caches filled
    mine = seconds(ours)
    theirs, scan = None, None
    if released:
        scan = "reference"
        with environment({SCAN: scan}):
            theirs = seconds(lambda: _as_released(model, image))
    return Inference(size=frame, seconds=mine, released=theirs, released_scan=scan)


def _as_released(model: DGSSModel, image: Tensor) -> None:
    """Every window for itself, the class texts computed again for each."""
    with evaluating(model):
        sliding_window(model.scores, image, model.spec.image_size, None, 1)


def _data_seconds(read: Callable[[], object]) -> float:
    read()
    return Stopwatch(torch.device("cpu")).timed("data", read)


def _paced(seconds: float, data: float | None, recipe: RecipeSpec) -> float:
    """Seconds from step to step: workers read ahead, or the step waits for its crops."""
    if data is None:
        return seconds
    return max(seconds, data / recipe.workers) if recipe.workers else seconds + data


def _dry_run(
    model: DGSSModel,
    optimizer: torch.optim.Optimizer,
    recipe: RecipeSpec,
    name: str,
    seconds: float,
    watch: Stopwatch,
) -> DryRun:
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    state = sum(
        t.numel() * t.element_size()
        for entry in optimizer.state.values()
        for t in entry.values()
        if isinstance(t, Tensor)
    )
    return DryRun(
        recipe=name,
        steps=recipe.steps,
        hours=seconds * recipe.steps * recipe.accumulate / 3600,
        weights=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        gradients=trained,
        optimizer=state,
        activations=sum(watch.saved.values()),
        checkpoint=math.ceil(trained + state),
    )
