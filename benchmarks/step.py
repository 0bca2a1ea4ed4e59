"""What a training step is made of, in the training loop itself.

python benchmarks/step.py                               the small pairing at 512x512, batch 2
python benchmarks/step.py --pairing demo --size 64 96 --steps 12
python benchmarks/step.py --json

Weights and crops are random and in memory: this is the loop without its loader, which
`mfuser bench` times. The first step is not counted (kernels are compiled, buffers allocated), nor
is the checkpoint at the end. `outside` is all that is neither forward, nor backward, nor optimizer:
losses on their way to the log, rates, seeds, progress.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from mfuser import load_registry
from mfuser.config.run import RunSpec
from mfuser.data.loading import Batch
from mfuser.engine import train as training
from mfuser.engine.console import Console
from mfuser.engine.processes import processes
from mfuser.engine.stopwatch import OTHER, Stopwatch, watch_model
from mfuser.model.assembly import random_model
from mfuser.reporting.adapter_cost import machine

PHASES = ("forward", "backward", "optimizer")
ADAPTERS = ("fusion", "enhancer")


class Done(Exception):
    """Enough steps."""


def measure(
    pairing: str, size: list[int], batch: int, steps: int, device: str, changes: list[str]
) -> dict[str, Any]:
    """Seconds of a step by phase and part, medians over `steps` of them. changes: of the recipe."""
    registry = load_registry()
    spec = registry.pairing(pairing, [f"image_size={size}"])
    recipe = registry.recipe(registry.recipe_of(pairing), [f"batch_size={batch}", *changes])
    run = RunSpec.of(registry, pairing, "step", pairing=spec, recipe=recipe, source="game")
    model = random_model(spec)
    crops = Batch(
        torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8),
        torch.randint(0, len(model.classes), (batch, *size)),
        [],
        ["random"] * batch,
    )
    begun: list[float] = []
    phases: dict[str, float] = defaultdict(float)
    by_phase: list[dict[str, float]] = []
    by_part: list[dict[tuple[str, str], float]] = []
    with tempfile.TemporaryDirectory() as folder, processes(recipe.precision, device) as group:
        trainer = training.Trainer(group, model, recipe, run, Path(folder), Console(quiet=True))
        watch = Stopwatch(group.accelerator.device)
        # Inside compiled code nobody can look at a clock.
        parts = watch_model(model, watch) if recipe.compile is None else []

        def fetch(step: int, start: int, batches: Any) -> list[Batch]:
            begun.append(watch._now())
            if len(begun) > 1:
                by_part.append(dict(watch.seconds))
                by_phase.append(dict(phases))
            watch.seconds.clear()
            phases.clear()
            if len(begun) > steps + 1:
                raise Done
            return [crops]

        def timed(phase: str, work: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                before = watch._now()
                with watch.during(phase):
                    found = work(*args, **kwargs)
                phases[phase] += watch._now() - before
                return found

            return run

        trainer._fetch = fetch  # type: ignore[method-assign]
        trainer.wrapped.forward = timed("forward", trainer.wrapped.forward)
        trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
        trainer.prepared.step = timed("optimizer", trainer.prepared.step)
        with contextlib.suppress(Done):
            trainer.fit(itertools.repeat(crops), 0)  # type: ignore[arg-type]
    whole = [b - a for a, b in itertools.pairwise(begun)][1:]
    seconds = statistics.median(whole)
    measured = list(zip(whole, by_phase[1:], strict=True))
    of = {phase: statistics.median(found[phase] for _, found in measured) for phase in PHASES}
    outside = statistics.median(took - sum(found.values()) for took, found in measured)
    table: dict[str, dict[str, float]] = {}
    for part in (*parts, OTHER):
        table[part] = {
            phase: statistics.median(found.get((phase, part), 0.0) for found in by_part[1:])
            for phase in ("forward", "backward")
        }
    adapters = sum(sum(table[part].values()) for part in ADAPTERS if part in table)
    return {
        "pairing": pairing,
        "image_size": size,
        "batch": batch,
        "changes": changes,
        "steps": steps,
        "machine": machine(device),
        "seconds": seconds,
        **of,
        "outside": outside,
        "outside_share": outside / seconds,
        "adapters_share": adapters / seconds,
        "parts": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairing", default="dinov2-s_clip-b")
    parser.add_argument("--size", type=int, nargs=2, default=[512, 512])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--set-recipe", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    found = measure(
        given.pairing, given.size, given.batch, given.steps, given.device, given.set_recipe
    )
    if given.json:
        print(json.dumps(found, indent=1))
        return
    whole = found["seconds"]
    rows = [
        [
            name,
            f"{s['forward']:.3f}",
            f"{s['backward']:.3f}",
            f"{100 * sum(s.values()) / whole:.1f} %",
        ]
        for name, s in found["parts"].items()
    ]
    for name in ("optimizer", "outside"):
        rows.append([name, f"{found[name]:.4f}", "", f"{100 * found[name] / whole:.2f} %"])
    print(
        f"{found['pairing']}, {found['image_size']}, batch {found['batch']}: {whole:.2f} s a step"
    )
    for row in [["part", "forward", "backward", "share"], *rows]:
        print("  ".join(f"{cell:>14}" for cell in row))
    print(f"fusion and enhancer, scans included: {100 * found['adapters_share']:.1f} %")


if __name__ == "__main__":
    main()
