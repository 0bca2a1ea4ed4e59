"""The training loop: one process on a laptop, many with torchrun, resumable to the bit.

Nothing random has a history: crop number n follows from (seed, n), and the generators of a step
are seeded from (seed, step). So a checkpoint needs weights, optimizer, step and float16's loss
scale alone, and a resumed run ends in the weights of one that never stopped.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec
from mfuser.data.images import UnreadableImage
from mfuser.data.loading import Batch, ClassMap, TrainingStream, training_stream
from mfuser.data.sampling import (
    ClassStatistics,
    RareClassSampler,
    ShuffledSampler,
    class_statistics,
)
from mfuser.data.transforms import Augmentation
from mfuser.engine import checkpoints
from mfuser.engine.checkpoints import Checkpoint
from mfuser.engine.console import Console
from mfuser.engine.folder import check_folder, clear_folder, open_folder
from mfuser.engine.log import EVERY, Log, summary_writer
from mfuser.errors import CheckpointError, DataError, MFuserError, placed
from mfuser.interfaces import Dataset
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel

COUNTED = 200
"""Source labels read for the most frequent class where nothing needs them all."""


class Interrupted(Exception):
    """Ctrl-C, after the step was finished and saved."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class Diverged(MFuserError):
    """The loss is no longer a number."""


def train(
    registry: Registry,
    run: RunSpec,
    folder: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> DGSSModel:
    """Train what `run` describes into `folder`; returns the model, finished and saved.

    Raises Interrupted after Ctrl-C (all is saved), Diverged, DataError, CheckpointError, …
    """
    recipe, spec = run.recipe, run.pairing
    accelerator = _accelerator(recipe, device)
    console = console or Console()
    console.quiet = console.quiet or not accelerator.is_main_process
    run = run.model_copy(update={"world": accelerator.num_processes})
    opened = False
    try:
        # Everything that can be wrong with what was given is found before the folder is made.
        check_folder(registry, folder, run, resume)
        source = run.source.build(registry, "train")
        for target in run.targets:
            target.build(registry, "val")
        try:
            model = build_model(spec, seed=run.seed)
        except MFuserError as error:
            raise placed(error, f"[pairing.{run.pairing_name}]") from error
        class_map = ClassMap(source, spec.classes)
        _check_crop(source, spec.image_size)
        if recipe.tensorboard:
            summary_writer()
        statistics = class_map.statistics(_statistics(source, recipe, console, accelerator))
        if accelerator.is_main_process:
            run = open_folder(registry, folder, run, resume)
            opened = True
        accelerator.wait_for_everyone()
        run = run.model_copy(
            update={
                "most_frequent": spec.classes[int(statistics.pixels.sum(0).argmax())],
                "source_classes": tuple(spec.classes[k] for k in class_map.shared),
            }
        )
        trainer = Trainer(accelerator, model, recipe, run, folder, console)
        start = trainer.resume() if resume else 0
        stream = training_stream(
            source,
            class_map,
            _sampler(source, recipe, statistics),
            Augmentation(recipe.augmentation, spec.image_size),
            seed=run.seed,
            steps=recipe.steps * recipe.accumulate,
            start=start * recipe.accumulate,
            batch_size=recipe.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=recipe.workers,
            skip_unreadable=recipe.on_bad_image == "skip",
        )
        trainer.fit(stream, start)
        return model.eval()
    except Exception:
        if opened and not resume and not (folder / checkpoints.LAST).is_file():
            clear_folder(folder)
        raise
    finally:
        accelerator.end_training()


def _accelerator(recipe: RecipeSpec, device: str | None) -> Accelerator:
    # Queries of classes that a crop lacks leave some parameters without a gradient.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    # Accelerate keeps one precision per process; a program may train several recipes.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=recipe.precision, cpu=device == "cpu", kwargs_handlers=handlers
    )


class Trainer:
    """The model, its optimizer and the loop."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: DGSSModel,
        recipe: RecipeSpec,
        run: RunSpec,
        folder: Path,
        console: Console,
    ) -> None:
        self.accelerator = accelerator
        self.recipe = recipe
        self.run = run
        self.folder = folder
        self.console = console
        model.encoder.checkpointing = recipe.checkpointing
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        self.names: dict[Tensor, str] = {
            p: n for n, p in model.named_parameters() if p.requires_grad
        }
        groups = parameter_groups(model, recipe)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, foreach=True)
        self.wrapped, self.prepared = accelerator.prepare(model, self.optimizer)
        self.frozen = checkpoints.frozen_fingerprint(model)

    def resume(self) -> int:
        """Continue from the last checkpoint; returns its step (0 if none was written yet)."""
        path = self.folder / checkpoints.LAST
        if not path.is_file():
            return 0
        checkpoint = checkpoints.read(path)
        if checkpoint.meta["pairing"] != self.run.pairing.model_dump(mode="json"):
            raise CheckpointError(f"{path} is of another pairing than the run in {self.folder}")
        checkpoints.restore(self.model, checkpoint, path)
        scale = checkpoint.meta.get("scaler")  # float16 may have skipped every step so far
        if checkpoint.step and not checkpoint.optimizer and scale is None:
            raise CheckpointError(f"{path} holds no state of the optimizer to resume from")
        checkpoints.from_optimizer_state(self.optimizer, self.names, checkpoint.optimizer)
        if self.accelerator.scaler is not None and scale is not None:
            self.accelerator.scaler.load_state_dict(scale)
        self.console.say(f"resuming {self.folder} at step {checkpoint.step}")
        return checkpoint.step

    def fit(self, stream: TrainingStream, start: int) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        self.wrapped.train()
        batches = iter(stream)
        with (
            _interruptible() as interrupted,
            self.console.task("training", recipe.steps, start) as task,
            Log(
                self.folder, active=accelerator.is_main_process, tensorboard=recipe.tensorboard
            ) as log,
        ):
            for step in range(start, recipe.steps):
                begun = time.perf_counter()
                losses = self._step(step, self._fetch(step, start, batches))
                loss = sum(losses.values())
                if not math.isfinite(loss):
                    raise Diverged(
                        f"the loss is {loss} at step {step + 1} ("
                        + ", ".join(k for k, v in losses.items() if not math.isfinite(v))
                        + f"); lower lr = {recipe.lr:g} or set clip_grad{self._kept()}"
                    )
                task.advance(note=f"loss {loss:.3f}")
                if step % EVERY == 0 or step + 1 == recipe.steps:
                    seconds = round(time.perf_counter() - begun, 4)
                    rate = self.optimizer.param_groups[0]["lr"]
                    log.write(step + 1, {"loss": loss, "lr": rate, "seconds": seconds, **losses})
                # Every process must leave in the same step.
                stop = accelerator.reduce(
                    torch.tensor(float(interrupted[0]), device=accelerator.device), "sum"
                )
                done = step + 1
                if done == recipe.steps or done % recipe.save_every == 0 or stop:
                    self._save(done)
                if stop and done < recipe.steps:
                    raise Interrupted(done)
            if start == recipe.steps:  # stopped between the last two files
                self._save(start)

    def _fetch(self, step: int, start: int, batches: Iterator[Batch]) -> list[Batch]:
        """What a step reads; an image that cannot be used costs none of the steps before it."""
        try:
            return [next(batches) for _ in range(self.recipe.accumulate)]
        except DataError as error:
            if step > start and self.accelerator.num_processes == 1:
                self._save(step)
                error.args = (f"{error} ({step} steps are saved; mend it and --resume)",)
            raise

    def _kept(self) -> str:
        if not (self.folder / checkpoints.LAST).is_file():
            return ""
        return f" (the last checkpoint in {self.folder} is from before)"

    def _step(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns the losses as numbers."""
        recipe, accelerator = self.recipe, self.accelerator
        key = np.random.SeedSequence((self.run.seed, step, accelerator.process_index))
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
        factor = recipe.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * factor * group["factor"]
        logged: dict[str, float] = {}
        for micro, batch in enumerate(batches):
            if batch.skipped:
                self.console.say(f"skipped, unreadable: {', '.join(batch.skipped)}")
            last = micro + 1 == recipe.accumulate
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                losses: dict[str, Tensor] = self.wrapped(
                    batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
                )
                total = torch.stack(list(losses.values())).sum()
                accelerator.backward(total / recipe.accumulate)
            for name, value in losses.items():
                logged[name] = logged.get(name, 0.0) + value.item() / recipe.accumulate
        if recipe.clip_grad is not None:
            accelerator.clip_grad_norm_(list(self.names), recipe.clip_grad)
        if all(math.isfinite(v) for v in logged.values()):
            self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        return logged

    def _save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        meta = {
            "pairing": self.run.pairing.model_dump(mode="json"),
            "run": self.run.model_dump(mode="json"),
            "step": step,
            "frozen": self.frozen,
        }
        state = checkpoints.trained_state(self.model)
        broken = [n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
        if broken:  # a finite loss may have an infinite gradient
            raise Diverged(
                f"{broken[0]} is no longer finite after step {step}; lower lr = "
                f"{self.recipe.lr:g} or set clip_grad{self._kept()}"
            )
        optimizer = checkpoints.to_optimizer_state(self.optimizer, self.names)
        scaler = self.accelerator.scaler  # None but in float16
        last = meta if scaler is None else meta | {"scaler": scaler.state_dict()}
        checkpoints.write(self.folder / checkpoints.LAST, Checkpoint(state, optimizer, last))
        if step == self.recipe.steps:
            checkpoints.write(self.folder / checkpoints.FINAL, Checkpoint(state, {}, meta))


def parameter_groups(model: DGSSModel, recipe: RecipeSpec) -> list[dict[str, object]]:
    """AdamW's groups: with and without decay, encoders at their own rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_backbone = name.startswith(("encoder.vfm.", "encoder.vlm."))
            decayed = not any(part in name for part in recipe.no_decay)
            groups.setdefault((in_backbone, decayed), []).append(parameter)
    if not groups:
        raise MFuserError("nothing in this pairing trains")
    return [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if decayed else 0.0,
            "factor": recipe.backbone_lr if in_backbone else 1.0,
        }
        for (in_backbone, decayed), parameters in groups.items()
    ]


def _statistics(
    source: Dataset, recipe: RecipeSpec, console: Console, accelerator: Accelerator
) -> ClassStatistics:
    """Class counts of the source: all of it for rare-class sampling, else a sample."""
    skip = recipe.on_bad_image == "skip"
    if recipe.rare_classes is None:
        return class_statistics(_Thinned(source, COUNTED), skip_unreadable=skip)
    cache = Path(os.environ.get("MFUSER_CACHE", Path.home() / ".cache" / "mfuser"))
    with accelerator.main_process_first(), console.task("counting classes", len(source)) as task:
        return class_statistics(
            source,
            cache,
            lambda done, total: task.advance(done - task.done),
            workers=min(8, os.cpu_count() or 1),
            skip_unreadable=skip,
        )


class _Thinned(Dataset):
    """At most `count` evenly spaced images of a dataset."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        self.dataset = dataset
        self.classes, self.class_ids = dataset.classes, dataset.class_ids
        count = min(count, len(dataset))
        self.indices = np.linspace(0, len(dataset) - 1, count, dtype=int).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        return self.dataset[self.indices[index]]

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[index])

    def label(self, index: int) -> np.ndarray:
        return self.dataset.label(self.indices[index])


def _sampler(
    source: Dataset, recipe: RecipeSpec, statistics: ClassStatistics
) -> RareClassSampler | ShuffledSampler:
    rare = recipe.rare_classes
    if rare is None:
        return ShuffledSampler(len(source))
    return RareClassSampler(statistics, rare.temperature, rare.min_pixels)


def _check_crop(source: Dataset, crop: tuple[int, int]) -> None:
    """The first image tells early what every image would."""
    try:
        height, width = source[0].image.shape[:2]
    except UnreadableImage:
        return  # fatal or skipped, as the recipe says, where it is read
    if height < crop[0] or width < crop[1]:
        raise DataError(
            f"{source.name(0)} is {height}x{width}, smaller than the crop of {crop[0]}x{crop[1]} "
            "(height x width): set a smaller image_size, e.g. --set image_size="
            f"{min(height, width)}"
        )


@contextlib.contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """The first Ctrl-C lets the step finish and be saved; the second ends at once."""
    asked = [False]

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = True

    # SIGTERM is how a scheduler announces that a job's time is up.
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, on_signal) for number in signals]
    except ValueError:  # not in the main thread
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
