"""The Triton scan on a GPU: time, share of memory bandwidth, and ratio to mamba-ssm if installed.

    python benchmarks/scan_gpu.py [--rounds 30] [--json FILE]

The values are compared with the reference first: a wrong result gets no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import scan_measure as measure

from mfuser_kernels import backends
from mfuser_kernels.testing import errors, scan_inputs

SHAPES = ((2, 2594, 512, 16), (2, 2594, 1024, 16), (8, 2594, 512, 16), (2, 16384, 512, 16))


def bandwidth() -> float:
    """GB/s of a large copy, counting bytes read and written."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy: Callable[[], Any] = lambda: target.copy_(source)  # noqa: E731
    times = measure.medians({"copy": copy}, 20, sync=torch.cuda.synchronize)
    return 2 * source.nbytes / times["copy"]["p50"] / 1e6


def least_bytes(x: dict[str, Any], backward: bool) -> int:
    """Each input is read and each output written once; the backward reads and writes them again."""
    rows = x["u"].nbytes
    matrices = x["B"].nbytes + x["C"].nbytes
    return 3 * rows + matrices + (backward and 5 * rows + 2 * matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    usable = {b.name: b for b in backends()}
    if not usable["triton"].usable:
        sys.exit(f"nothing to measure: {usable['triton'].reason}")
    names = [n for n in ("triton", "mamba_ssm", "chunked") if usable[n].usable]
    peak = bandwidth()
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for batch, length, width, states in SHAPES:
            shape = {"batch": batch, "length": length, "width": width, "states": states}
            small = scan_inputs(**{**shape, "length": 300}, gate=False, dtype=dtype, device="cuda")
            worst = max(errors(small, "triton").values())
            if not worst < (1e-5 if dtype == torch.float32 else 1e-2):
                print(f"{shape} {dtype}: error {worst:.1e}, not timed")
                continue
            x = measure.inputs(**shape, dtype=dtype, device="cuda")
            for backward in (False, True):
                calls = {
                    n: measure.training(x, measure.ours(n)) if backward else measure.forward(x, n)
                    for n in names
                }
                found = measure.medians(calls, options.rounds, sync=torch.cuda.synchronize)
                least = least_bytes(x, backward) / peak / 1e6
                for name, times in found.items():
                    row = {
                        **shape,
                        "dtype": str(dtype),
                        "backward": backward,
                        "backend": name,
                        **times,
                        "share of bandwidth": least / times["p50"],
                        "x triton": times["p50"] / found["triton"]["p50"],
                    }
                    rows.append(row)
                    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                                    for k, v in row.items()))  # fmt: skip
    print(f"copy {peak:.0f} GB/s")
    if options.json:
        found = {"environment": measure.environment(), "copy GB/s": peak, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
