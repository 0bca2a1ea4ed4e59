"""Commands as a shell sees them: help, JSON, exit codes, what goes to which stream."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from mfuser.cli import cli
from mfuser.version import __version__


def commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        return [path]
    return [path] + [
        found
        for name, inner in command.commands.items()
        for found in commands(inner, (*path, name))
    ]


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_has_help(mfuser: Any, path: tuple[str, ...]) -> None:
    result = mfuser(*path, "--help")
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(f"Usage: mfuser {' '.join(path)}".rstrip())
    lines = [line for line in result.out.splitlines() if line.strip()]
    assert len(lines) > 3 and not lines[1].strip().startswith("Options")
    assert result.out == mfuser(*path, "-h").out
    # A server answers people, not programs.
    if path and path != ("serve",) and not isinstance(_command(path), click.Group):
        assert "--json" in result.out


def _command(path: tuple[str, ...]) -> click.Command:
    command: Any = cli
    for name in path:
        command = command.commands[name]
    return command


def test_nothing_given_is_help(mfuser: Any) -> None:
    assert mfuser().out == mfuser("--help").out and mfuser().code == 0
    assert mfuser("--version").out.strip() == f"mfuser, version {__version__}"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, mfuser.cli\n"
        "try: mfuser.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'timm', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 0.15), (["list"], 2.0)])
def test_help_and_list_are_quick(arguments: list[str], limit: float) -> None:
    """Seconds of processor time, which a busy machine does not stretch as it does the clock."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    for _ in range(2):  # the first may have byte code to write
        before = spent()
        subprocess.run(
            [sys.executable, "-m", "mfuser", *arguments], check=True, capture_output=True
        )
        # Twice the promise: two processes on one core share its caches.
        if (seconds := spent() - before) < 2 * limit:
            return
    raise AssertionError(f"{seconds:.2f} s of processor time")


def test_list(mfuser: Any, write_registry: Any) -> None:
    registry = write_registry()
    shown = json.loads(mfuser("list", "--registry", registry, "--json").out)
    assert {"name": "tiny", "where": str(registry)} in shown["pairings"]
    assert {"demo", "dinov2-s_clip-b"} <= {p["name"] for p in shown["pairings"]}
    linear = next(c for c in shown["decoder"] if c["name"] == "linear")
    assert linear["plugin"] == "linear" and linear["help"].startswith("A linear probe")
    assert all(c["help"] for kind in ("vision", "fusion", "dataset") for c in shown[kind])
    only = json.loads(mfuser("list", "fusion", "--json").out)
    assert list(only) == ["fusion"]
    text = mfuser("list", "--registry", registry).out
    assert re.search(rf"^  tiny +{re.escape(str(registry))}$", text, re.M)
    assert "vision-language" in text and "mvfuser" in text


def test_describe(mfuser: Any, write_registry: Any) -> None:
    registry = write_registry()
    facts = json.loads(mfuser("describe", "tiny", "--registry", registry, "--json").out)
    assert facts["pairing"] == "tiny" and facts["image_size"] == [64, 96]
    assert facts["encoders"]["vfm"]["grid"] == [4, 6] and facts["encoders"]["vlm"]["depth"] == 2
    parts = {p["part"]: p for p in facts["parts"]}
    assert parts["vfm"]["trained"] == 0 and parts["vfm"]["frozen"] > 0
    assert parts["decoder"]["frozen"] == 0 and parts["prompt"]["trained"] == 2 * 32
    assert facts["trained"] == sum(p["trained"] for p in facts["parts"])
    text = mfuser("describe", "tiny", "--registry", registry)
    assert f"{facts['trained']:,}" in text.out and text.err == ""


def test_describe_counts_what_is_built(mfuser: Any, write_registry: Any, tiny: Any) -> None:
    from mfuser import build_model

    registry = write_registry()
    for pairing in ("tiny", "plain", "lone"):
        facts = json.loads(mfuser("describe", pairing, "--registry", registry, "--json").out)
        model = build_model(pairing, tiny)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        assert (facts["trained"], facts["frozen"]) == (trained, frozen)


def test_doctor_and_data_check(mfuser: Any, write_registry: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("MFUSER_DATA", raising=False)
    report = json.loads(mfuser("doctor", "--json").out)
    assert report["versions"]["mfuser"] == __version__ and "cores" in report["devices"]["cpu"]
    registry = write_registry()
    found = mfuser("data", "check", "toy", "gta", "--registry", registry, "--json")
    assert found.code == 2  # of what was asked for, something is missing
    entries = {(e["dataset"], e["split"]): e for e in json.loads(found.out)}
    assert entries["toy", "val"]["images"] == 6 and entries["toy", "val"]["sizes"] == {"96x64": 6}
    assert "the folder of dataset 'gta' is not known" in entries["gta", "train"]["missing"]
    assert mfuser("data", "check", "toy", "--registry", registry).code == 0


def test_train_evaluate_predict(mfuser: Any, write_registry: Any, inside: Path) -> None:
    registry = ["--registry", write_registry()]
    options = ["--recipe", "tiny", "--out", "r", "--set-recipe", "baselines=true"]
    result = mfuser("train", "plain", *options, *registry, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert set(report["domains"]) == {"toy", "toy-night"} and set(report["untrained"]) == {
        "toy",
        "toy-night",
    }
    assert json.loads((inside / "r/report.json").read_text()) == report
    assert "training 4/4" in result.err and (inside / "r/pictures/toy.png").is_file()

    again = json.loads(mfuser("evaluate", "r", *registry, "--json", "--baselines").out)
    assert again == report
    text = mfuser("evaluate", "r", "--targets", "toy-night", "--out", "other", *registry)
    assert text.code == 0 and "mIoU" in text.out and "report: other/report.html" in text.out
    assert json.loads((inside / "r/report.json").read_text()) == report
    assert "toy.png" not in (inside / "other/report.md").read_text()

    Image.new("RGB", (96, 64), "red").save("photo.png")
    shown = json.loads(mfuser("predict", "r", "photo.png", *registry, "--json").out)
    assert shown[0]["image"] == "photo.png" and Path(shown[0]["mask"]).is_file()
    assert mfuser("predict", "r", "photo.png", *registry).out == (
        "1 masks and overlays in predictions\n"
    )


def test_short_options_are_the_recipes(mfuser: Any, write_registry: Any, inside: Path) -> None:
    registry = ["--registry", write_registry()]
    options = ["--recipe", "tiny", "--out", "r", "--steps", "2", "--seed", "7", "--no-evaluate"]
    result = mfuser("train", "plain", *options, *registry, "--json")
    assert json.loads(result.out) == {"run": "r"}
    run = json.loads((inside / "r/run.json").read_text())
    assert (run["recipe"]["steps"], run["recipe"]["seed"], run["seed"]) == (2, 7, 7)


def test_where_output_is_cut_short(tmp_path: Path) -> None:
    """Nobody reading (`| head`) is not worth a traceback."""
    script = tmp_path / "say.py"
    script.write_text(
        "import click\n"
        "from mfuser.cli import cli, emit, main\n"
        "option = click.Option(['--json'], is_flag=True, expose_value=False)\n"
        "say = lambda: emit(list(range(99_999)))\n"
        "cli.add_command(click.Command('say', callback=say, params=[option]))\n"
        "main(['say', '--json'])\n"
    )
    command = f"{sys.executable} {script} | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_a_terminal_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    from mfuser.cli import main

    out = io.BytesIO()
    # What rich prints, tables of figures, goes to the stream as it is.
    monkeypatch.setattr("mfuser.cli.doctor.examine", lambda: print("96×192") or {})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    sys.stdout.flush()
    assert stop.value.code == 0 and b"96?192" in out.getvalue()


def test_interrupted_is_130(mfuser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mfuser.cli.doctor.examine", interrupt)
    result = mfuser("doctor")
    assert result.code == 130 and result.err.strip() == "mfuser: interrupted"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory(mfuser: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mfuser.cli.doctor.examine", fail)
    result = mfuser("doctor")
    assert result.code == 2 and "out of memory; lower batch_size or image_size" in result.err


def test_a_mistake_of_ours_is_not_hidden(mfuser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("mfuser.cli.doctor.examine", fail)
    from mfuser.cli import main

    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_a_run_copied_elsewhere_is_whole(
    mfuser: Any, write_registry: Any, trained: Path, inside: Path
) -> None:
    shutil.copy(trained / "model.safetensors", inside / "mine.safetensors")
    result = mfuser("evaluate", "mine.safetensors", "--registry", write_registry(), "--json")
    assert result.code == 0 and json.loads(result.out)["pairing"] == "plain"
    assert (inside / "report.json").is_file()


@pytest.mark.parametrize(
    "code",
    [
        "import mfuser",
        "from mfuser import MFuserError, hookimpl, TokenShape, FusionSpec, Options",
        "from mfuser.cli import main; main(['--help'])",
        "from mfuser.cli import main; main(['train', '--help'])",
        "from mfuser.cli import main; main(['list', 'nothing-of-the-kind', '--all'])",
    ],
)
def test_what_needs_no_torch_does_not_import_it(code: str) -> None:
    """torch takes a second or more; help, completion and writing specs do without."""
    check = (
        "import atexit, os, sys; heavy = {'torch', 'numpy', 'timm', 'transformers'};\n"
        "atexit.register(lambda: heavy & set(sys.modules) and os._exit(77))\n"
    )
    ran = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True)
    assert ran.returncode != 77 and "Traceback" not in ran.stderr, ran.stderr
