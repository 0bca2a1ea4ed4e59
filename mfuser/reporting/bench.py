"""The cost of a pairing on a machine: the record, its table, its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mfuser.files import replacing, write_json
from mfuser.reporting.tables import Table
from mfuser.specs import Options


class PartCost(Options):
    """One part. forward, backward: seconds of a training step; inference: of an image.

    parameters, trained: their number. flops: of the forward pass and backward pass of a step.
    saved_bytes: kept from forward to backward. of_peak: FLOPs a second of the step over the peak.
    """

    part: str
    parameters: int
    trained: int
    forward: float
    backward: float
    flops: int
    saved_bytes: int
    of_peak: float | None
    inference: float | None = None


class Inference(Options):
    """Seconds an image of `size` (height, width), median; released: the same scores made one
    window at a time, with the class texts computed for each and the reference scan."""

    size: tuple[int, int]
    seconds: float
    released: float | None
    released_scan: str | None


class DryRun(Options):
    """The cost of a whole training by the recipe here. hours: without validation and tests.

    weights, gradients, optimizer, activations: bytes; the most that one step holds is about their
    sum. checkpoint: bytes on disk, of which a run keeps the last one and the trained weights.
    """

    recipe: str
    steps: int
    hours: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


class Bench(Options):
    """seconds: of a training step, median over `repeats`; the parts' are scaled to it.

    peak_bytes: the most that a step held on a GPU; None elsewhere.
    """

    pairing: str
    image_size: tuple[int, int]
    batch: int
    precision: str
    checkpointing: bool
    machine: dict[str, Any]
    peak_flops: float
    repeats: int
    seconds: float
    peak_bytes: int | None
    optimizer: float
    data: float | None
    parts: list[PartCost]
    inference: Inference | None
    dry_run: DryRun

    def tables(self) -> list[Table]:
        heads = ("part", "params M", "trained M", "forward ms", "backward ms", "of step", "GFLOPs",
                 "of peak", "saved MB", "image ms")  # fmt: skip
        rows = [self._row(p) for p in self.parts]
        rows.append(["optimizer", "", "", f"{1e3 * self.optimizer:.1f}", "",
                     f"{self.optimizer / self.seconds:.1%}", "", "", "", ""])  # fmt: skip
        if self.data is not None:
            rows.append(["data, one process", "", "", f"{1e3 * self.data:.1f}", "",
                         f"({self.data / self.seconds:.1%})", "", "", "", ""])  # fmt: skip
        return [Table(heads, rows, title=f"{self.pairing}: a step of {self.batch} crops", left=1)]

    def _row(self, p: PartCost) -> list[str]:
        share = (p.forward + p.backward) / self.seconds
        return [
            p.part,
            _million(p.parameters),
            _million(p.trained),
            f"{1e3 * p.forward:.1f}",
            f"{1e3 * p.backward:.1f}" if p.backward else "",
            f"{share:.1%}",
            f"{p.flops / 1e9:.1f}" if p.flops else "",
            "" if p.of_peak is None else f"{p.of_peak:.0%}",
            f"{p.saved_bytes / 1e6:.1f}" if p.saved_bytes else "",
            "" if p.inference is None else f"{1e3 * p.inference:.1f}",
        ]

    def summary(self) -> list[str]:
        height, width = self.image_size
        lines = [
            f"a step of {self.batch} crops of {height}x{width}: {self.seconds:.3f} s, median of "
            f"{self.repeats}; precision {self.precision}"
            + (", checkpointing" if self.checkpointing else ""),
            f"peak of the device, measured by a matrix product: {self.peak_flops / 1e9:,.0f} "
            "GFLOPs a second",
        ]
        if self.peak_bytes is not None:
            lines.append(f"highest memory of a step: {self.peak_bytes / 1e9:.2f} GB")
        if self.inference is not None:
            i = self.inference
            told = f"an image of {i.size[0]}x{i.size[1]}: {i.seconds:.2f} s"
            if i.released is not None:
                told += (
                    f"; window by window with the class texts each time and the scan "
                    f"'{i.released_scan}', as released: {i.released:.2f} s, "
                    f"{i.released / i.seconds:.1f} times as long"
                )
            lines.append(told)
        d = self.dry_run
        lines.append(
            f"recipe '{d.recipe}', {d.steps:,} steps here: about {d.hours:.1f} h; memory about "
            f"{d.memory / 1e9:.2f} GB (weights {d.weights / 1e9:.2f}, gradients "
            f"{d.gradients / 1e9:.2f}, optimizer {d.optimizer / 1e9:.2f}, activations "
            f"{d.activations / 1e9:.2f}); checkpoint {d.checkpoint / 1e6:,.0f} MB"
        )
        where = ", ".join(f"{k} {v}" for k, v in self.machine.items())
        return [*lines, f"measured on {where}; random weights"]


def save(found: Bench, folder: Path) -> str | None:
    """bench.json, and bench.png where matplotlib is; returns why there is no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", found.model_dump(mode="json"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'no chart: matplotlib is not installed (pip install "mfuser[plot]")'
    parts = [p for p in found.parts if p.forward or p.backward][::-1]
    names = [p.part for p in parts]
    figure = Figure(figsize=(7.0, 1.2 + 0.36 * len(parts)), layout="tight")
    axis = figure.subplots()
    forward = [1e3 * p.forward for p in parts]
    axis.barh(names, forward, label="forward")
    axis.barh(names, [1e3 * p.backward for p in parts], left=forward, label="backward")
    axis.set_xlabel(f"ms of a training step ({1e3 * found.seconds:.0f} ms)")
    axis.set_title(f"{found.pairing} on {found.machine['device']}", fontsize=9)
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    with replacing(folder / "bench.png") as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return None


def _million(count: int) -> str:
    return f"{count / 1e6:.2f}" if count else ""
