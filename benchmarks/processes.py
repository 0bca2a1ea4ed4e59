"""Images a second of several processes against one, each on one thread.

    python benchmarks/processes.py [--pairing demo] [--processes 2] [--steps 60] [--out FILE.json]

Every process takes the recipe's batch, so that two of them do twice the work in a step. They take
turns, one run of each after the other, and the median of the runs counts. Check the load of the
machine first (`uptime`): each process needs a core to itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def rate(processes: int, pairing: str, recipe: str, steps: int, folder: Path) -> float:
    """Images a second: the median over the logged steps but the first, which warms up."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), "-m", "mfuser", "train", pairing]
    command += ["--recipe", recipe, "--steps", str(steps), "--no-evaluate", "--device", "cpu"]
    command += ["--out", str(folder), "--set-recipe", f"save_every={steps}"]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    subprocess.run(command, check=True, env=os.environ | threads, stdout=subprocess.DEVNULL)
    run = json.loads((folder / "run.json").read_text("utf-8"))
    crops = run["recipe"]["batch_size"] * run["recipe"]["accumulate"] * run["world"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return crops / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairing", default="demo")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], given.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for processes, found in rates.items():
                place = Path(folder) / f"{processes}-{number}"
                found.append(rate(processes, given.pairing, given.recipe, given.steps, place))
                print(f"{processes} process(es): {found[-1]:.2f} images/s", flush=True)
    one, several = (statistics.median(found) for found in rates.values())
    print(f"{given.processes} processes: {several / one:.2f} times the images a second of one")
    if given.out is not None:
        table = {"pairing": given.pairing, "recipe": given.recipe, "steps": given.steps}
        table |= {"rates": rates, "times": several / one, "load": os.getloadavg()[0]}
        given.out.write_text(json.dumps(table, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
