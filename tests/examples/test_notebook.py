"""The notebook, run from its first cell to its last by a kernel of its own."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest


def pictures(notebook: Any) -> int:
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.slow
def test_own_data(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the outputs that it was committed with: tables and three pictures."""
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    notebook = nbformat.read(root / "examples" / "own_data.ipynb", 4)
    nbformat.validate(notebook)
    assert pictures(notebook) == 3

    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    (tmp_path / "here").mkdir()
    for cell in notebook.cells:
        cell.pop("outputs", None) and cell.update(outputs=[])
    nbclient.NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path / "here")}},
    ).execute()
    assert pictures(notebook) == 3
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "written to registry.toml" in text and "mIoU" in text
    right = re.search(r"pixels with the right class: ([0-9.]+)%", text)
    assert right is not None and float(right[1]) > 60  # grass everywhere: 37
    held = {p.name for p in (tmp_path / "here" / "runs" / "garden").iterdir()}
    assert {"model.safetensors", "report.html", "report.md"} <= held
