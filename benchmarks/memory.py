"""Peak memory of a training step on this CPU, each in a process of its own: docs/scale.md states
what this prints.

    python benchmarks/memory.py small    dinov2-s_clip-b, 512x512, batch 2, with and without
                                         checkpointing, and with frozen weights in bfloat16
    python benchmarks/memory.py large    dinov2-l_eva02-clip-l, 512x512, batch 1, frozen weights in
                                         bfloat16, checkpointing (about two minutes of a processor)
    python benchmarks/memory.py step PAIRING [--batch N] [--set-recipe KEY=VALUE …]

Weights are random: memory does not depend on them, and nothing is downloaded. What is printed is
the most that the process ever held (ru_maxrss), Python and libraries included (`idle`: them alone).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

SMALL, LARGE = "dinov2-s_clip-b", "dinov2-l_eva02-clip-l"
CASES = {
    "small": [
        (SMALL, 2, ()),
        (SMALL, 2, ("checkpointing=true",)),
        (SMALL, 2, ("checkpointing=true", "frozen_dtype=bfloat16")),
    ],
    "large": [(LARGE, 1, ("checkpointing=true", "frozen_dtype=bfloat16"))],
}


def held() -> float:
    """GB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step(pairing: str, batch: int, settings: list[str]) -> dict[str, float]:
    """One step forward, backward and of the optimizer, as the trainer does it."""
    import torch

    from mfuser import load_registry
    from mfuser.engine.memory import make_ready
    from mfuser.engine.optimizer import parameter_groups
    from mfuser.model.assembly import random_model

    registry = load_registry()
    spec = registry.pairing(pairing)
    recipe = registry.recipe("paper", [*settings, f"batch_size={batch}"])
    idle = held()
    model = random_model(spec)
    for line in make_ready(model, recipe, torch.device("cpu")):
        print(line, file=sys.stderr)
    built, started = held(), time.process_time()
    images = torch.rand(batch, 3, *spec.image_size)
    labels = torch.randint(0, len(model.classes), (batch, *spec.image_size))
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=1e-4, foreach=True)
    model.train()
    torch.stack(list(model(images, labels).values())).sum().backward()
    optimizer.step()
    seconds = time.process_time() - started
    return {"peak": held(), "built": built, "idle": idle, "processor seconds": seconds}


def fresh(pairing: str, batch: int, settings: tuple[str, ...]) -> dict[str, float]:
    """`step` in a process of its own."""
    options = [f"--set-recipe={setting}" for setting in settings]
    command = [sys.executable, __file__, "step", pairing, f"--batch={batch}", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step", *CASES])
    parser.add_argument("pairing", nargs="?", default=SMALL)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--set-recipe", action="append", default=[])
    given = parser.parse_args()
    if given.what == "step":
        print(json.dumps(step(given.pairing, given.batch, given.set_recipe)))
        return
    most = None
    for pairing, batch, settings in CASES[given.what]:
        found = fresh(pairing, batch, settings)
        most = most or found["peak"]
        print(
            f"{pairing}, batch {batch}, {' '.join(settings) or 'as it is'}: peak "
            f"{found['peak']:.2f} GB ({found['peak'] / most:.0%} of the first), built "
            f"{found['built']:.2f}, idle {found['idle']:.2f}; "
            f"{found['processor seconds']:.0f} s of a processor",
            flush=True,
        )


if __name__ == "__main__":
    main()
