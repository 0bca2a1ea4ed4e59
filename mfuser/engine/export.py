"""A trained model as a program of standard operators: torch.export or ONNX.

What is exported takes one window, RGB in [0, 1], and returns class scores; the class texts are in
it as constants. Larger images go through `model.sliding_window` around it, or a loop of the user's.
"""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mfuser.errors import MFuserError, MissingExtraError
from mfuser.files import check_writable, utf8_name
from mfuser.model.dgss import DGSSModel
from mfuser.model.merging import merge_tuning

Format = Literal["torch", "onnx"]
ENDINGS: dict[str, str] = {"torch": ".pt2", "onnx": ".onnx"}
INPUT, OUTPUT = "images", "scores"
LARGEST_BATCH = 1024
TOLERANCE = {"torch": 1e-5, "onnx": 1e-4}
"""Largest difference of a score, relative to the largest score: sums in another order."""


@dataclass(frozen=True)
class Exported:
    """The written file, and how it compares with the model on random images.

    difference: largest of a score, relative to the largest score. agreement: share of pixels with
    the same class. bytes: of the file and what lies beside it.
    """

    path: str
    format: Format
    window: tuple[int, int]
    classes: tuple[str, ...]
    difference: float
    agreement: float
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Window(nn.Module):
    """(B, 3, *window) RGB in [0, 1] -> class scores (B, K, *window)."""

    text: Tensor | None

    def __init__(self, model: DGSSModel) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            text = model.text().detach() if model.encoder.vlm is not None else None
        self.register_buffer("text", text)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.scores(images, self.text)


def export(model: DGSSModel, path: Path, format: Format) -> Exported:
    """Write `path` and compare it with the model, at batches of 1 and 3.

    The model is left in float32 on the CPU, its updates folded into the weights (`merge_tuning`).

    Raises MissingExtraError without ONNX's packages, MFuserError where the model holds what cannot
    be exported or the program differs from it; then nothing is left at `path`.
    """
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            _needed(name)
    if path.suffix != ENDINGS[format]:
        raise MFuserError(f"--out {path}: a {format} program ends in {ENDINGS[format]}")
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    window = Window(merge_tuning(model.float().cpu().eval())).eval()
    images = _images(2, model.spec.image_size)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    try:
        # The text tower stays behind: its texts are constants.
        with torch.no_grad(), _quiet(), _without(window, _unread(window, images)):
            program = torch.export.export(window, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export raises what the traced code and its own passes raise
        raise MFuserError(
            f"the model cannot be exported: {_first_line(error)}; backbones that run on lists or "
            "numbers taken out of tensors (NaFlex, dynamic resolutions) are of that kind"
        ) from error
    facts = _facts(model)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with utf8_name(temporary) as named:
            run = _WRITERS[format](program, named, facts)
            difference, agreement = _compare(window, run, model.spec.image_size)
        if not difference <= TOLERANCE[format]:
            raise MFuserError(
                f"the exported program differs from the model by {difference:.1e} of the largest "
                f"score ({TOLERANCE[format]:g} allowed); it was not kept"
            )
        size = temporary.stat().st_size
        os.replace(temporary, path)
        beside = temporary.with_name(temporary.name + ".data")
        if beside.is_file():  # ONNX keeps weights above 2 GB in a file of their own
            size += beside.stat().st_size
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(
        str(path), format, model.spec.image_size, model.classes, difference, agreement, size
    )


class _Reads(TorchFunctionMode):
    """Remembers which tensors torch's functions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._see(args)
        self._see(tuple((kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def _see(self, given: Any) -> None:
        if isinstance(given, Tensor):
            self.seen.add(id(given))
        elif isinstance(given, (tuple, list)):
            for one in given:
                self._see(one)


def _unread(module: nn.Module, images: Tensor) -> set[str]:
    """Parameters that nothing reads on the way from images to scores."""
    with _Reads() as reads:
        module(images)
    return {name for name, p in module.named_parameters() if id(p) not in reads.seen}


@contextmanager
def _without(module: nn.Module, names: set[str]) -> Iterator[None]:
    """The module without these parameters, which it has again afterwards."""
    taken = [(*name.rpartition("."), module.get_parameter(name)) for name in names]
    try:
        for part, _, key, _ in taken:
            setattr(module.get_submodule(part), key, None)
        yield
    finally:
        for part, _, key, parameter in taken:
            setattr(module.get_submodule(part), key, parameter)


def _write_torch(
    program: torch.export.ExportedProgram, path: Path, facts: str
) -> Callable[[Tensor], Tensor]:
    torch.export.save(program, path, extra_files={"mfuser.json": facts})
    loaded: Any = torch.export.load(path).module()
    return lambda images: loaded(images)


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, facts: str
) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    with _quiet():
        written = torch.onnx.export(
            program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
        )
    assert written is not None
    written.model.metadata_props["mfuser"] = facts
    written.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


_WRITERS = {"torch": _write_torch, "onnx": _write_onnx}


def _facts(model: DGSSModel) -> str:
    """The facts that users of the program need, as JSON inside the file."""
    return json.dumps(
        {
            "classes": model.classes,
            "window": model.spec.image_size,
            "input": "RGB in [0, 1], (batch, 3, height, width), float32",
            "output": "class scores, (batch, classes, height, width); the largest is the class",
        }
    )


def _images(batch: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, *size, generator=generator)


def _compare(
    window: Window, run: Callable[[Tensor], Tensor], size: tuple[int, int]
) -> tuple[float, float]:
    """(largest difference relative to the largest score, share of pixels of the same class)."""
    difference, same = 0.0, []
    for batch in (1, 3):
        images = _images(batch, size)
        with torch.no_grad():
            ours, theirs = window(images), run(images)
        largest = ours.abs().max().clamp_min(1e-12)
        difference = max(difference, float((ours - theirs).abs().max() / largest))
        same.append((ours.argmax(1) == theirs.argmax(1)).float().mean())
    return difference, float(torch.stack(same).mean())


def _needed(name: str) -> None:
    try:
        import_module(name)
    except ImportError as error:
        raise MissingExtraError(name, "export", "ONNX export") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report their progress on standard output, which is for results."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
