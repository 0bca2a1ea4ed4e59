"""Everything that a GPU has to show, in one go: a JSON file and a Markdown table.

    python benchmarks/gpu_suite.py [--out gpu]              on a machine with CUDA, under 8 minutes
    python benchmarks/gpu_suite.py --device cpu --pairing demo --only step compile
                                                            to try the script where there is none

Kernel tests, the scan against mamba-ssm where that imports, a whole training step in four
settings, the training loop, an image by sliding window against the released way, torch.compile,
memory. Weights are random and nothing is downloaded. A section that fails or runs out of time is
named, and ends no other one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PAIRING = "dinov2-l_eva02-clip-l"
SETTINGS = {
    "step, float32": ("precision=no", "frozen_dtype=float32"),
    "step, frozen weights in bf16": ("precision=no", "frozen_dtype=bfloat16"),
    "step, bf16": ("precision=bf16",),
    "step, bf16, checkpointing": ("precision=bf16", "checkpointing=true"),
}
LOOPS = {"loop": ("precision=bf16",), "loop, compiled": ("precision=bf16", "compile=true")}
MODES = ("default", "reduce-overhead")
LIMIT = 120
"""Seconds that a command of a section may take."""


def run(command: list[str], limit: int = LIMIT) -> tuple[int, str, str]:
    """Exit code (124: out of time), standard output, standard error."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"stopped after {limit} s"
    return done.returncode, done.stdout, done.stderr


def tests(_: argparse.Namespace, __: Path) -> dict[str, Any]:
    """The kernel tests that need a GPU."""
    code, out, _err = run([sys.executable, "-m", "pytest", "-m", "gpu", "tests/kernels"])
    return {"exit code": code, "result": out.strip().splitlines()[-1] if out.strip() else ""}


def scan(_: argparse.Namespace, out: Path) -> dict[str, Any]:
    """benchmarks/scan_gpu.py."""
    path = out / "scan_gpu.json"
    script = ["benchmarks/scan_gpu.py", "--rounds", "10", "--json", str(path.absolute())]
    code, _out, err = run([sys.executable, *script])
    if code:
        raise RuntimeError(err.strip()[-300:])
    return dict(json.loads(path.read_text("utf-8")))


def step(options: argparse.Namespace, _: Path) -> dict[str, Any]:
    """mfuser bench in each setting; the image only once."""
    found = {}
    for k, (name, changes) in enumerate(SETTINGS.items()):
        command = [sys.executable, "-m", "mfuser", "bench", options.pairing, "--json"]
        command += ["--device", options.device, "--repeats", "3"]
        command += [part for c in changes for part in ("--set-recipe", c)]
        if k == 0:
            command += ["--frame", *map(str, options.frame)]
        code, out, err = run(command)
        found[name] = json.loads(out) if code == 0 else {"failed": err.strip()[-300:]}
    return found


def loop(options: argparse.Namespace, _: Path) -> dict[str, Any]:
    """benchmarks/step.py: the training loop, and compiled."""
    found = {}
    for name, changes in LOOPS.items():
        command = [sys.executable, "benchmarks/step.py", "--json", "--pairing", options.pairing]
        command += ["--device", options.device, "--steps", "3"]
        command += [part for c in changes for part in ("--set-recipe", c)]
        code, out, err = run(command)
        found[name] = json.loads(out) if code == 0 else {"failed": err.strip()[-300:]}
    return found


def compiled(options: argparse.Namespace, _: Path) -> dict[str, Any]:
    """Scores of one window, eager and compiled block by block: milliseconds, graph breaks, largest
    difference."""
    from mfuser import build_model, load_registry
    from mfuser.config.compilation import CompileSpec
    from mfuser.engine.compiling import compile_parts
    from mfuser.model.assembly import without_weights

    spec = without_weights(load_registry().pairing(options.pairing))
    model = build_model(spec).to(options.device).eval()
    window = torch.rand(1, 3, *spec.image_size, device=options.device)
    with torch.no_grad():
        text = model.text() if model.encoder.vlm is not None else None

        def scores() -> torch.Tensor:
            return model.scores(window, text)

        eager = scores()
        found: dict[str, Any] = {
            "graph breaks": torch._dynamo.explain(scores)().graph_break_count,
            "eager ms": milliseconds(scores, options.device),
        }
        for mode in MODES if options.device == "cuda" else MODES[:1]:
            torch._dynamo.reset()
            compile_parts(model, CompileSpec.model_validate({"mode": mode}), print)
            begun = time.perf_counter()
            difference = (scores() - eager).abs().max() / eager.abs().max()
            found |= {
                f"{mode}: seconds to compile": round(time.perf_counter() - begun, 1),
                f"{mode}: ms": milliseconds(scores, options.device),
                f"{mode}: largest difference, relative": float(difference),
            }
        return found


def milliseconds(work: Any, device: str, repeats: int = 10) -> float:
    """Median."""
    taken = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - begun))
    return sorted(taken)[len(taken) // 2]


SECTIONS = {"tests": tests, "scan": scan, "step": step, "loop": loop, "compile": compiled}


def markdown(found: dict[str, Any]) -> str:
    """One table of what people ask first; the JSON has everything."""
    lines = [f"# {found['machine']['device']}", "", "| what | figure |", "|---|--:|"]
    for key, value in found["machine"].items():
        lines.append(f"| {key} | {value} |")
    if "result" in found.get("tests", {}):
        lines.append(f"| kernel tests | {found['tests']['result']} |")
    for name, one in found.get("step", {}).items():
        if "seconds" not in one:
            lines.append(f"| {name} | failed |")
            continue
        lines.append(f"| {name}, batch {one['batch']} | {1000 * one['seconds']:.0f} ms |")
        if one.get("peak_bytes"):
            lines.append(f"| {name}: highest memory | {one['peak_bytes'] / 1e9:.2f} GB |")
        image = one.get("inference")
        if image:
            size = "x".join(map(str, image["size"]))
            lines.append(f"| image {size} | {1000 * image['seconds']:.0f} ms |")
            if image["released"]:
                ratio = image["released"] / image["seconds"]
                lines.append(f"| the released way takes | {ratio:.1f} times as long |")
    for name, one in found.get("loop", {}).items():
        if "seconds" in one:
            share = f"{100 * one['outside_share']:.1f} % outside the passes"
            lines.append(f"| {name} | {1000 * one['seconds']:.0f} ms a step, {share} |")
    for key, value in found.get("compile", {}).items():
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        lines.append(f"| torch.compile, one window: {key} | {text} |")
    for name in SECTIONS:
        if "failed" in found.get(name, {}):
            lines.append(f"| {name} | failed: {found[name]['failed']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pairing", default=PAIRING)
    parser.add_argument("--frame", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; --device cpu tries the script")
    from mfuser.reporting.adapter_cost import machine

    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(options.device)}
    begun = time.perf_counter()
    for name in options.only:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            found[name] = SECTIONS[name](options, options.out)
        except Exception as error:  # the other sections have something to say
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    found["machine"]["minutes of the suite"] = round((time.perf_counter() - begun) / 60, 1)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    (options.out / "gpu.md").write_text(markdown(found), "utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
