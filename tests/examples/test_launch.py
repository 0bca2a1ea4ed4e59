"""The files under examples/launch say what accelerate understands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mfuser.cli import cli
from mfuser.engine import processes


@pytest.mark.parametrize(
    ("file", "machines", "on_each"),
    [("gpus.yaml", None, 4), ("nodes.yaml", 2, 8), ("sharded.yaml", None, 4)],
)
def test_files_of_accelerate(
    file: str, machines: int | None, on_each: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(root / "examples/launch" / file), "--machine_rank", "1"]
    given = launch.launch_command_parser().parse_args([*words, "-m", "mfuser", "train"])
    asked, *_ = launch._validate_launch_command(given)  # raises for keys that it does not know
    variables = prepare_multi_gpu_env(asked)
    assert int(asked.nproc_per_node) == on_each
    if machines is not None:
        assert int(asked.nnodes) == machines and asked.rdzv_endpoint == "node-0:29500"
        assert asked.node_rank == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.check_launch()
    assert processes.asks_for_shards() == (file == "sharded.yaml")


def test_the_script_for_slurm(root: Path) -> None:
    """It is a script of bash, and its command line one of ours."""
    file = root / "examples/launch/slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
    command = file.read_text("utf-8").rpartition("-m mfuser ")[2].split()
    assert command[0] == "train"
    known = {option for one in cli.commands["train"].params for option in one.opts}
    assert {word for word in command if word.startswith("--")} <= known
