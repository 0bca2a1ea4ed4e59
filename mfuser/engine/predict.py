"""Masks and overlays of any photographs and videos, from a trained run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfuser.config.registry import Registry
from mfuser.engine import compiling, photographs, submission
from mfuser.engine.ahead import ahead, workers_of
from mfuser.engine.checkpoints import load_model
from mfuser.engine.console import Console
from mfuser.engine.decision import probabilities
from mfuser.engine.exhaustion import explained
from mfuser.engine.inference import of_record, split
from mfuser.engine.inputs import LEGEND, VIDEOS, file_names
from mfuser.engine.measure import text_of
from mfuser.engine.photographs import Scale, located, read
from mfuser.engine.precision import Choice, Precision
from mfuser.engine.video import VideoReader, VideoWriter
from mfuser.errors import DataError, MFuserError, unknown
from mfuser.files import check_writable, clear_leftovers, replacing
from mfuser.inference import Inference
from mfuser.model.assembly import with_classes
from mfuser.model.dgss import DGSSModel
from mfuser.model.network import TrainedNetwork
from mfuser.model.window_batch import WindowBatch
from mfuser.reporting import draw
from mfuser.reporting.adapter_cost import default_device

SMALLER = "--scale 0.5; --device cpu where there is more memory than on the GPU"
"""Remedies when memory runs out."""
ScoreFile = Literal["npz", "png", "bravo"]
Entry = dict[str, Any]
"""Of one image: its files and classes, or why it was skipped."""
Finishing = Callable[[], Entry]
"""Writes the files of one image that is segmented, or raises why there are none."""

KEPT = 256 * 2**20
"""Bytes of the photographs that are kept from the check to their turn."""


def predict(
    registry: Registry,
    run: Path,
    images: Sequence[Path],
    out: Path,
    *,
    settings: Sequence[str] = (),
    device: str | None = None,
    scale: Scale = 1.0,
    inference: str | None = None,
    stride: tuple[int, int] | None = None,
    window_batch: WindowBatch | None = None,
    skip_unreadable: bool = False,
    scores: ScoreFile | None = None,
    classes: Sequence[str] | None = None,
    weights: str | None = None,
    workers: int | None = None,
    compile: bool = False,
    precision: Choice = "auto",
    console: Console | None = None,
) -> list[Entry]:
    """Writes NAME.mask.png (palette, index = class id) and NAME.overlay.png for every image; for a
    video NAME.mask.mkv (lossless, gray level = class id) and NAME.overlay.mp4.

    Photographs are turned as viewers show them (EXIF), and masks lie on them so. scale: resize by
    this factor first; "auto": enlarge what is smaller than the window. inference, stride,
    window_batch: in place of the recipe's inference, whose options may be among the settings
    ("inference.flip=false").
    scores: also write class probabilities, NAME.scores.npz (float16, (K, H, W)), or
    NAME.confidence.png (8 bits), or "bravo", what that challenge's server takes.
    classes: only these are predicted; names that the model was not trained on where its decoder
    reads any text. weights: which of the run's (see `load_model`).
    skip_unreadable: leave out whatever cannot be used, and say so. workers: threads that read
    ahead while the device computes, beside one that writes; 0: neither; None: see `workers_of`.
    compile: by torch.compile, as the settings say ("compile.mode=reduce-overhead").
    precision: see `Precision.of_inference`.

    Every photograph is read to its end before anything is written. Returns, per image, its files
    and the share of pixels of each class, or why it was skipped.
    """
    console = console or Console()
    photographs.check_scale(scale)
    images = list(dict.fromkeys(images))
    check_writable(out)
    own, others = split(settings)
    compilation, others = compiling.asked(compile, others)
    model, checkpoint = load_model(run, registry, others, weights)
    record = checkpoint.meta["run"]
    windows: Any = {"stride": stride, "window_batch": window_batch}
    asked_for = of_record(registry, record, str(run), name=inference, settings=own, **windows)
    model, chosen = _chosen(model, classes)
    if scores == "bravo":
        submission.check(model.classes)
    if compilation is not None:
        compiling.compile_parts(model, compilation, console.say)
    where = torch.device(device or default_device())
    how = Precision.of_inference(where, record, precision)
    threads, segmenting = workers_of(workers), how.around(asked_for.build())
    work = _Work(how.prepare(model), chosen, where, scale, segmenting, scores, out, threads)
    work.look(images, skip_unreadable)  # before anything is written
    if scale == 1.0 and (said := _too_large(record, list(work.sizes.values()))):
        console.say(said)
    work.text = text_of(model)
    out.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)
    written: list[Entry] = []
    with (
        console.task("segmenting", len(images)) as task,
        ahead(images, work.read, threads) as readings,
        ahead(work.finishing(images, readings, skip_unreadable), _call, min(1, threads)) as files,
    ):
        for path, finished in zip(images, files, strict=True):
            try:
                written.append(finished())
            except MFuserError as error:
                if not skip_unreadable:
                    raise
                console.say(f"skipped: {error}")
                written.append({"image": str(path), "skipped": str(error)})
            except OSError as error:
                raise DataError(f"{out} cannot be written: {error}") from error
            task.advance()
    if any("mask" in entry for entry in written):
        draw.save(draw.legend(draw.with_ids(model.classes), work.table, 640), out / LEGEND)
    return written


def _chosen(
    model: DGSSModel, classes: Sequence[str] | None
) -> tuple[DGSSModel, tuple[int, ...] | None]:
    """The model, renamed where it can be, and the class ids to choose among."""
    if classes is None:
        return model, None
    twice = next((c for c in classes if list(classes).count(c) > 1), None)
    if not classes or twice is not None:
        raise MFuserError(f"--classes names '{twice}' twice" if twice else "--classes names none")
    strange = [c for c in classes if c not in model.classes]
    if not strange:
        return model, tuple(model.classes.index(c) for c in classes)
    if not model.decoder.open_vocabulary:
        raise MFuserError(
            f"the model knows no class {unknown(strange, model.classes)}. Its decoder "
            f"'{model.spec.decoder.name}' answers for the {len(model.classes)} classes that it was "
            "trained on; only one that reads any text, such as text_similarity, takes new names"
        )
    return with_classes(model, tuple(classes)), None


def _too_large(run: Any, sizes: Sequence[tuple[int, int]]) -> str | None:
    """A sentence where images are much larger than what the run was tested at, by its record."""
    targets = run.get("targets") or () if isinstance(run, dict) else ()
    tested = [t["spec"]["test_size"] for t in targets if (t.get("spec") or {}).get("test_size")]
    if not tested or not sizes:
        return None
    width, height = tested[0]
    factors = [min(width, height) / min(size) for size in sizes]
    large = [factor for factor in factors if factor < 0.67]
    if len(large) * 2 < len(sizes):
        return None
    return (
        f"{len(large)} of {len(sizes)} images are larger than those that the run was tested on "
        f"(resized to {width}x{height}): --scale {np.median(large):.2g} shows them as large"
    )


def _call(finishing: Finishing) -> Entry:
    return finishing()


def _raise(error: Exception) -> NoReturn:
    raise error


@dataclass
class _Work:
    """The work on each image. chosen: ids to choose among; None: all. workers: threads that
    read. kept: photographs that were read for the check, until their turn. text: `text_of`."""

    model: DGSSModel
    chosen: tuple[int, ...] | None
    where: torch.device
    scale: Scale
    inference: Inference
    scores: ScoreFile | None
    out: Path
    workers: int
    text: Tensor | None = None
    kept: dict[Path, np.ndarray] = field(default_factory=dict)
    unusable: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.table = draw.palette(self.model.classes)
        self.sizes: dict[Path, tuple[int, int]] = {}  # (height, width) of what can be used

    def look(self, images: Sequence[Path], skip: bool) -> None:
        """Read every image to its end: why some cannot be used. The first raises unless skip.

        As many as fit are kept, so that they are read once.
        """
        network, room = TrainedNetwork(self.model), KEPT
        # The device waits for this, so its core reads, too.
        with ahead(images, _seen, self.workers and self.workers + 1) as seen:
            for path, sight in zip(images, seen, strict=True):
                try:
                    with located(path):
                        image, size = sight()
                        self.sizes[path] = size
                        window = self.model.spec.image_size
                        self.inference.check(network, photographs.scaled(size, self.scale, window))
                        if image is None and self.scores is not None:
                            raise MFuserError(
                                "--scores is for photographs; leave it out for videos"
                            )
                        if self.scores == "bravo":
                            submission.place(path)
                except MFuserError as error:
                    if not skip:
                        raise
                    self.unusable[path] = str(error)
                    continue
                if image is not None and image.nbytes <= room:
                    self.kept[path] = image
                    room -= image.nbytes

    def read(self, path: Path) -> np.ndarray | None:
        """The photograph; None for a video. Raises DataError as `look` found."""
        if path in self.unusable:
            raise DataError(self.unusable[path])
        if _is_video(path):
            return None
        kept = self.kept.pop(path, None)
        return read(path) if kept is None else kept

    def finishing(
        self,
        images: Sequence[Path],
        readings: Iterable[Callable[[], np.ndarray | None]],
        skip: bool,
    ) -> Iterator[Finishing]:
        """Segments image by image. Without skip the first that fails is the last."""
        for path, name, reading in zip(images, file_names(images), readings, strict=True):
            failed: Exception | None = None
            try:
                image = reading()
                if image is None:
                    finishing = self._video(path, name)
                else:
                    finishing = self._photograph(path, name, image)
            except (MFuserError, OSError) as error:
                failed, finishing = error, partial(_raise, error)
            yield finishing
            if failed is not None and not (skip and isinstance(failed, MFuserError)):
                return

    def _photograph(self, path: Path, name: str, image: np.ndarray) -> Finishing:
        shares = self._segment(path, image)  # (K, H, W)
        label = self._ids(shares)
        beside = None
        if self.scores == "png":
            beside = (shares.amax(0) * 255).round().to(torch.uint8).cpu().numpy()
        elif self.scores == "npz":
            beside = shares.half().cpu().numpy()
        elif self.scores == "bravo":
            beside = shares.amax(0).cpu().numpy()
        return partial(self._write, path, name, image, label, beside)

    def _write(
        self, path: Path, name: str, image: np.ndarray, label: np.ndarray, beside: np.ndarray | None
    ) -> Entry:
        """beside: the confidence (H, W) or the scores (K, H, W), as they are asked for."""
        mask, over = self.out / f"{name}.mask.png", self.out / f"{name}.overlay.png"
        entry = {"image": str(path), "mask": str(mask), "overlay": str(over)}
        # First the rest: a mask never stands without its overlay.
        with replacing(mask) as unnamed:
            draw.indexed(label, self.table).save(unnamed, "PNG")
            draw.save(Image.fromarray(draw.overlay(image, label, self.table)), over)
            if self.scores == "png" and beside is not None:
                file = self.out / f"{name}.confidence.png"
                draw.save(Image.fromarray(beside), file)
                entry["confidence"] = str(file)
            elif self.scores == "bravo" and beside is not None:
                entry |= submission.write(self.out, path, label, beside)
            elif self.scores == "npz" and beside is not None:
                file = self.out / f"{name}.scores.npz"
                names = [self.model.classes[k] for k in self._among()]
                with replacing(file) as part, part.open("wb") as stream:
                    np.savez_compressed(stream, scores=beside, classes=np.array(names))
                entry["scores"] = str(file)
        counts = np.bincount(label.ravel(), minlength=len(self.model.classes))
        return {**entry, "classes": self._named(counts)}

    def _video(self, path: Path, name: str) -> Finishing:
        """Segmented and written frame by frame, whatever else still waits to be written."""
        reader = VideoReader(path)
        mask, over = self.out / f"{name}.mask.mkv", self.out / f"{name}.overlay.mp4"
        counts, frames = np.zeros(len(self.model.classes), np.int64), 0
        thread = min(1, self.workers)  # a film is read and written in order
        with replacing(mask) as mask_part, replacing(over) as over_part:
            ids = VideoWriter(mask_part, reader.rate, reader.size, ids=True)
            shown = VideoWriter(over_part, reader.rate, reader.size, ids=False)

            def write(done: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
                frame, label = done
                ids.write(label.astype(np.uint8))
                shown.write(draw.overlay(frame, label, self.table))
                return np.bincount(label.ravel(), minlength=len(counts))

            try:
                with (
                    ahead(repeat(iter(reader)), _next, thread) as read_frames,
                    ahead(self._labeled(path, read_frames), write, thread) as written,
                ):
                    for found in written:
                        counts += found()
                        frames += 1
            finally:
                ids.close()
                shown.close()
        files = {"image": str(path), "mask": str(mask), "overlay": str(over)}
        entry = {**files, "frames": frames, "classes": self._named(counts)}
        return lambda: entry

    def _labeled(
        self, path: Path, frames: Iterable[Callable[[], np.ndarray | None]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Frames and their class ids, to the end of the film."""
        for read_frame in frames:
            frame = read_frame()
            if frame is None:
                return
            yield frame, self._ids(self._segment(path, frame))

    def _among(self) -> Sequence[int]:
        return self.chosen if self.chosen is not None else range(len(self.model.classes))

    def _ids(self, shares: Tensor) -> np.ndarray:
        best = shares.max(0).indices.cpu().numpy()  # `argmax` takes four times as long
        return best if self.chosen is None else np.asarray(self.chosen)[best]

    def _named(self, counts: np.ndarray) -> dict[str, float]:
        total = max(1, int(counts.sum()))
        pairs = zip(self.model.classes, counts, strict=True)
        return {c: round(float(n / total), 4) for c, n in pairs if n}

    def _segment(self, path: Path, image: np.ndarray) -> Tensor:
        """(H, W, 3) -> class probabilities (K, H, W)."""
        height, width = image.shape[:2]
        window = self.model.spec.image_size
        pixels = photographs.pixels(image, self.scale, window, self.where)
        size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        with located(path), explained(self.inference, size, len(self.model.classes), SMALLER):
            scores = self.model.segment_by(self.inference, pixels, text=self.text)
            return probabilities(scores[0], (height, width), self.chosen, self.model.decoder.scores)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def _seen(path: Path) -> tuple[np.ndarray | None, tuple[int, int]]:
    """A photograph with its (height, width); of a video the size alone."""
    if _is_video(path):
        return None, VideoReader(path).size
    image = read(path)
    return image, (image.shape[0], image.shape[1])


def _next(frames: Iterator[np.ndarray]) -> np.ndarray | None:
    return next(frames, None)
