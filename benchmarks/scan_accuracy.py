"""Errors of the scan against float64 where decays are close to 1: the table in docs/scan.md.

Of 1 - 1e-8 float32 keeps 1, and of a decay that is the same at every step always the same part is
lost. `reference` in float32 shows what that does to the recurrence as it is written.
"""

from __future__ import annotations

import argparse
from operator import itemgetter

import torch

from mfuser_kernels.testing import errors, inverse_softplus, run_scan, scan_inputs

BACKENDS = ("reference", "chunked", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=20000, help="steps")
    parser.add_argument("--width", type=int, default=16, help="channels")
    arguments = parser.parse_args()
    print(f"L {arguments.length}, D {arguments.width}, N 8: largest relative RMS error, its tensor")
    print("| delta | " + " | ".join(BACKENDS) + " |")
    print("|---|" + "---|" * len(BACKENDS))
    for size in (1e-8, 1e-6, 1e-3):
        for spread, word in ((0.0, "at every step"), (0.5, "on average")):
            inputs = scan_inputs(1, arguments.length, arguments.width, 8, softplus=True, bias=False)
            step = size * torch.exp(spread * torch.randn_like(inputs["delta"]))
            inputs["delta"] = inverse_softplus(step)
            exact = run_scan(inputs, "reference", torch.float64)
            cells = []
            for backend in BACKENDS:
                name, error = max(errors(inputs, backend, exact=exact).items(), key=itemgetter(1))
                cells.append(f"{error:.0e} ({name})")
            print(f"| {size:.0e} {word} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
