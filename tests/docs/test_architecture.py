"""The picture of the layers is drawn from the code, and the code has no other rooms."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_FLOOR = {"__init__", "__main__", "py.typed", "__pycache__"}


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    file = ROOT / "docs" / "draw_architecture.py"
    spec = importlib.util.spec_from_file_location("draw_architecture", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_code(draw: ModuleType) -> None:
    drawn = draw.PICTURE.read_text("utf-8")
    assert drawn == draw.drawing(), "run `python docs/draw_architecture.py`"


def test_every_room_stands_on_a_floor(draw: ModuleType) -> None:
    rooms = {path.stem for path in (ROOT / "mfuser").iterdir()} - WITHOUT_FLOOR - {"registry"}
    assert rooms - {"py"} == {room for floor in draw.floors() for room in floor}


def test_no_arrow_points_up_or_along(draw: ModuleType) -> None:
    floors = draw.floors()
    level = {room: k for k, floor in enumerate(floors) for room in floor}
    found = draw.arrows(list(level))
    assert ("model", "config") in found and ("engine", "model") not in found  # by way of reporting
    # interfaces and specs stand side by side and may know each other.
    assert all(level[a] < level[b] or {a, b} == {"interfaces", "specs"} for a, b in found)


def test_the_page_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text):
        assert (ROOT / "mfuser" / name).is_file() or (ROOT / name).is_file(), name


@pytest.mark.parametrize("room", ["model", "data", "engine", "study"])
def test_the_page_names_every_module(room: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = text.split("## Inside the rooms\n", 1)[1].split(f"| `{room}` |", 1)[1]
    named = set(re.findall(r"`(\w+)`", re.split(r"\n\| `|\n\n", rows)[0]))
    modules = {path.stem for path in (ROOT / "mfuser" / room).iterdir()} - WITHOUT_FLOOR
    assert named == modules, "bring 'Inside the rooms' of docs/architecture.md up to date"
