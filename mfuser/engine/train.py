"""The training loop: one process on a laptop, many with torchrun, resumable to the bit.

Nothing random has a history: crop number n follows from (seed, n), and the generators of a step
are seeded from (seed, step). So a checkpoint needs weights, their averages where there are some,
optimizer, step and float16's loss scale alone, and a resumed run ends in the weights of one that
never stopped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfuser.config.recipe import RecipeSpec
from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec
from mfuser.data.loading import Batch, TrainingStream, copied_ahead, training_stream
from mfuser.data.transforms import Augmentation
from mfuser.engine import checkpoints, diagnose, exhaustion, precheck, trackers
from mfuser.engine.averaging import Averages, take
from mfuser.engine.compiling import compile_parts
from mfuser.engine.console import Console
from mfuser.engine.diagnose import Diverged as Diverged
from mfuser.engine.folder import (
    PAGE,
    RUN,
    Resume,
    check_folder,
    check_unlocked,
    clear_folder,
    open_folder,
    resumes,
)
from mfuser.engine.live import Live
from mfuser.engine.log import EVERY, Log, Watcher
from mfuser.engine.memory import make_ready
from mfuser.engine.optimizer import adamw, parameter_groups, set_rates
from mfuser.engine.pending import Losses, Step, deferrable
from mfuser.engine.precision import Precision
from mfuser.engine.processes import Processes, processes
from mfuser.engine.saving import Saver
from mfuser.engine.signals import interruptible
from mfuser.engine.source import (
    Built,
    build_sources,
    check_crops,
    count_classes,
    crop_sources,
    described,
)
from mfuser.engine.validate import Kept, Validator, keep_back
from mfuser.engine.wrapping import begin_sharding, lay_out, reread, wrap
from mfuser.errors import MFuserError, OutOfMemoryError, out_of_memory, placed
from mfuser.losses import whole_batch
from mfuser.model.assembly import build_model
from mfuser.model.dgss import DGSSModel


class Interrupted(Exception):
    """Ctrl-C or a scheduler's signal, after the step was finished and saved. signal: its number; 0
    where another process got it."""

    def __init__(self, step: int, signal: int = 0) -> None:
        super().__init__(step)
        self.step, self.signal = step, signal


@dataclass(frozen=True)
class Finished:
    """model: trained and saved, in eval mode. run: as it was begun, with what the source shows.
    step, weights: after which its weights were these, and what `Checkpoint.meta` says of them."""

    model: DGSSModel
    run: RunSpec
    step: int
    weights: dict[str, Any]


def train(
    registry: Registry,
    run: RunSpec,
    folder: Path,
    *,
    resume: Resume = False,
    device: str | None = None,
    console: Console | None = None,
    joined: Processes | None = None,
) -> Finished:
    """Train what `run` describes into `folder`; nothing is evaluated.

    resume: "auto" goes on where the folder holds a run, and else begins one. joined: the
    processes of the surrounding command. Raises Interrupted after Ctrl-C (all is saved), Diverged,
    DataError, CheckpointError, OutOfMemoryError, …
    """
    recipe = run.recipe
    console = console or Console()
    with processes(recipe.precision, device, joined) as group, contextlib.ExitStack() as held:
        console.quiet = console.quiet or not group.main
        precision = Precision.of_training(recipe, group.accelerator.device)
        begin_sharding(group, recipe)
        run = run.model_copy(update={"world": group.count, "precision": str(precision)})
        opened = going_on = False
        try:
            going_on = group.from_main(lambda: resumes(folder, resume))
            # Everything that can be wrong with what was given is found before the folder is made.
            parts = group.together(lambda: _parts(registry, run, folder, going_on, group.main))
            statistics = group.from_main(lambda: count_classes(parts.sources, run, console))
            # As JSON, since a class of a plugin's file does not travel between processes.
            table = group.from_main(
                lambda: open_folder(registry, folder, run, going_on, held).model_dump(mode="json")
            )
            opened = group.main
            run = RunSpec.read(registry, table, str(folder / RUN))
            run = described(run, parts.sources, statistics)
            trainer = Trainer(group, parts.model, recipe, run, folder, console, parts.kept)
            start = trainer.resume() if going_on else 0
            stream = training_stream(
                crop_sources(parts.sources, run, statistics),
                Augmentation(recipe.augmentation, parts.model.spec.image_size),
                shares=[source.share for source in run.sources],
                seed=run.seed,
                steps=recipe.steps * recipe.accumulate,
                start=start * recipe.accumulate,
                batch_size=recipe.batch_size,
                rank=group.rank,
                world=group.count,
                workers=recipe.workers,
                prefetch=recipe.prefetch,
                pinned=group.accelerator.device.type == "cuda",
                skip_unreadable=recipe.on_bad_image == "skip",
            )
            group.from_main(lambda: check_crops(stream, start, run))
            console.say(f"progress: {folder / PAGE}")
            trainer.fit(stream, start)
            return trainer.finished()
        except Exception as error:
            explained = isinstance(error, Diverged)  # by the run's record and log, which stay
            saved = (folder / checkpoints.LAST).is_file()
            if opened and not (going_on or saved or explained):
                clear_folder(folder)
            raise


@dataclass
class _Parts:
    sources: list[Built]
    kept: list[Kept]
    model: DGSSModel


def _parts(registry: Registry, run: RunSpec, folder: Path, resume: bool, main: bool) -> _Parts:
    """Builds the parts of a run, each checked; nothing is written."""
    if main:
        check_folder(registry, folder, run, resume)
        check_unlocked(folder)
    sources = build_sources(registry, run)
    for target in run.targets:
        target.build(registry, "val")
    try:
        model = build_model(run.pairing, seed=run.seed)
    except MFuserError as error:
        raise placed(error, f"[pairing.{run.pairing_name}]") from error
    try:
        parameter_groups(model, run.recipe)
    except MFuserError as error:
        place = f"recipe '{run.recipe_name}' on pairing '{run.pairing_name}'"
        raise placed(error, place) from error
    trackers.check(run.recipe.trackers)
    left, kept = keep_back(
        registry, run, [source.dataset for source in sources], run.pairing.image_size
    )
    sources = [replace(one, dataset=part) for one, part in zip(sources, left, strict=True)]
    return _Parts(sources, kept, model)


class Trainer:
    """The model, its optimizer and the loop."""

    def __init__(
        self,
        group: Processes,
        model: DGSSModel,
        recipe: RecipeSpec,
        run: RunSpec,
        folder: Path,
        console: Console,
        kept: Sequence[Kept] = (),
    ) -> None:
        self.group = group
        self.accelerator = group.accelerator
        self.recipe = recipe
        self.run = run
        self.folder = folder
        self.console = console
        for line in make_ready(model, recipe, group.accelerator.device):
            console.say(line)
        lay_out(group, model, console)
        self.model = model
        self.names: dict[Tensor, str] = {
            p: n for n, p in model.named_parameters() if p.requires_grad
        }
        deferred = deferrable(group)
        fused = deferred or (self.accelerator.device.type == "cuda" and not group.sharded)
        self.optimizer = adamw(model, recipe, fused)
        self.wrapped, self.prepared = wrap(group, model, self.optimizer, console)
        self.losses = Losses(group, self.optimizer, recipe.accumulate, deferred)
        if recipe.compile is not None:
            compile_parts(model, recipe.compile, console.say, training=True)
        # After preparing, which moves the weights to their device.
        self.averages = Averages(model, recipe.ema) if recipe.ema is not None else None
        self.saver = Saver(
            group, model, self.optimizer, self.names, self.averages, run, folder, console
        )
        self.kept = kept
        self.validator = (
            Validator(kept, model, self.averages, run, folder, group, console) if kept else None
        )

    def resume(self) -> int:
        """Continue from the last whole checkpoint; returns its step (0 if there is none)."""
        step = self.saver.resume()
        if self.validator is not None and step:
            self.validator.resume()
        return step

    def fit(self, stream: TrainingStream, start: int) -> None:
        recipe, group = self.recipe, self.group
        if start < recipe.steps:
            group.together(lambda: precheck.check_parts(self.model, self.accelerator.device))
        self.wrapped.train()
        batches = copied_ahead(iter(stream), self.accelerator.device)
        with (
            interruptible() as asked,
            self.saver,
            self.console.task("training", recipe.steps, start) as task,
            self._log(start) as log,
        ):
            note = ""
            for step in range(start, recipe.steps):
                self.losses.clock()
                fetched = self._fetch(step, start, batches)
                with self._fitting(step, start):
                    self._step(step, fetched)
                done = step + 1
                logs = step % EVERY == 0 or done == recipe.steps
                measures = self.validator is not None and self.validator.due(done)
                saves = done == recipe.steps or done % recipe.save_every == 0
                stop = asked() or self.saver.failed
                if self.losses.due(logs or measures or saves, stop):
                    # Every process must leave in the same step.
                    last, stop, seconds = self._look(stop)
                    note = f"loss {last.loss:.3f}"
                    if logs:
                        rate = recipe.lr * recipe.rate(step)
                        line = {"loss": last.loss, "lr": rate, "seconds": round(seconds, 4)}
                        log.write(done, line | last.shared)
                else:
                    stop = False
                task.advance(note=note)
                if self.averages is not None:
                    self.averages.update(done)
                if self.validator is not None and measures:
                    with self._saving(done):
                        log.validated(self.validator(done, partial(self.saver.save_best, done)))
                if saves or stop:
                    self.saver.save(done)
                    log.saved()
                if stop and done < recipe.steps:
                    self.saver.wait()
                    raise Interrupted(done, max(group.gathered([asked.number])))
            if start == recipe.steps:  # it may have been stopped between the last two files
                self.saver.complete()

    def finished(self) -> Finished:
        """The trained model as its file gives it back, in every process: the weights that the
        recipe wants to be evaluated."""
        step, kind = self.recipe.steps, self.recipe.kind_of_weights
        weights: dict[str, Any] = {"kind": kind}
        if kind == "best":
            path = self.folder / checkpoints.BEST
            best = self.group.together(lambda: checkpoints.read(path))
            checkpoints.restore(self.model, best, path)
            step, weights = best.step, best.meta["weights"]
        elif self.group.sharded:  # what comes now needs the whole model in each process
            device = self.accelerator.device
            self.model = self.group.together(lambda: reread(self.run, self.folder, kind, device))
        elif self.averages is not None and kind == "averaged":
            take(self.model, self.averages)
        self.group.same_buffers(self.model)
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.model.record = self.saver.meta(step)
        if kind != "last":
            self.model.record["weights"] = weights
        self.model.decoder.progress = 1.0
        return Finished(self.model.eval(), self.run, step, weights)

    def _fetch(self, step: int, start: int, batches: Iterator[Batch]) -> list[Batch]:
        """The batches of a step; an image that cannot be used costs none of the steps before it."""
        with self._saving(step) if step > start else contextlib.nullcontext():
            return self.group.together(
                lambda: [next(batches) for _ in range(self.recipe.accumulate)]
            )

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """An error within costs none of the steps before it."""
        try:
            yield
        except Exception as error:
            if self.losses.waiting:
                self._look(False)
            self.saver.save(step)
            self.saver.wait()
            if isinstance(error, MFuserError):
                error.args = (f"{error} ({step} steps are saved; fix it and --resume)",)
            raise

    @contextlib.contextmanager
    def _fitting(self, step: int, start: int) -> Iterator[None]:
        """Memory that runs out costs none of the steps before this one, where they can be saved."""
        with exhaustion.undone(self.model, self.optimizer) as undo:
            try:
                yield
            except Exception as error:
                if not out_of_memory(error):
                    raise
                device = self.accelerator.device
                said = exhaustion.of_training(self.model, self.recipe, step, device)
                whole = undo(error) and step > start and self.group.main
                self.losses.forget()
                if self.losses.waiting and self.group.count == 1:
                    self._look(False)
                if whole and not self.losses.waiting and self.saver.save_now(step):
                    said += f" ({step} steps are saved; --resume goes on)"
                raise OutOfMemoryError(said) from error

    def _log(self, start: int) -> Log:
        run, folder, names = self.run, self.folder, self.recipe.trackers
        watchers: list[Watcher] = [Live(folder, run, self.model.classes, self.kept)]
        watchers += [trackers.Tracker(name, folder, run) for name in names]
        return Log(folder, start, active=self.group.main, watchers=watchers, console=self.console)

    def _look(self, asked: bool) -> tuple[Step, bool, float]:
        """Fetch the losses of the steps since the last call: the last of these, whether a process
        is to stop, seconds of a step. Raises Diverged where a loss is not finite."""
        steps, stop, seconds = self.losses.fetch(asked)
        for one in steps:
            if not math.isfinite(one.loss):
                self.group.together(lambda: self._diverged(one))  # noqa: B023
                raise Diverged(
                    f"the loss is {one.loss} at step {one.number + 1}, summed over processes"
                )
        return steps[-1], stop, seconds

    def _diverged(self, one: Step) -> None:
        """Raises Diverged in a process whose own losses are not finite; the step is saved."""
        if self.group.sharded or all(math.isfinite(v) for v in one.own.values()):
            return  # in shards, no process can look for the cause alone
        kept = self.saver.kept()
        raise diagnose.diverged(self.model, self.run, one, self.group, self.folder, kept)

    def _step(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns its losses as numbers, as far as they are known already."""
        recipe, accelerator = self.recipe, self.accelerator
        diagnose.seed_step(self.run.seed, step, accelerator.process_index)
        self.model.decoder.progress = step / recipe.steps
        set_rates(self.optimizer, recipe, step)
        self.losses.begin(step, batches)
        for micro, batch in enumerate(batches):
            if batch.skipped:
                self.console.say(f"skipped, unreadable: {', '.join(batch.skipped)}")
            last = micro + 1 == recipe.accumulate
            with (
                contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped),
                whole_batch.over(self.group),
            ):
                losses: dict[str, Tensor] = self.wrapped(*batch.to(accelerator.device))
                total = torch.stack(list(losses.values())).sum()
                accelerator.backward(total / recipe.accumulate)
            self.losses.add(losses)
        if recipe.clip_grad is not None:
            accelerator.clip_grad_norm_(list(self.names), recipe.clip_grad)
        if self.losses.passed():
            self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        return self.losses.own
