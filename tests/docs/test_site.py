"""The docs site: what the build itself cannot see."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import mfuser

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(root: Path) -> ModuleType:
    """docs/_site/hooks.py and options.py, which lie outside every package, as one namespace."""
    found = ModuleType("site")
    for name in ("hooks", "options"):
        spec = importlib.util.spec_from_file_location(name, root / f"docs/_site/{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        vars(found).update(vars(module))
    return found


PAGES = ("interfaces", "losses", "inference", "specs")
"""Modules that stand in the API's pages whole."""


def test_every_public_name_has_its_place(root: Path) -> None:
    pages = "\n".join(p.read_text("utf-8") for p in (root / "docs/api").glob("*.md"))
    there = {
        name
        for module in PAGES
        if f"::: mfuser.{module}\n" in pages
        for name in vars(importlib.import_module(f"mfuser.{module}"))
    }
    absent = [
        name
        for name in set(mfuser.__all__) - there - {"__version__"}
        if not re.search(rf"\bmfuser\.{name}\b", pages)
    ]
    assert not absent


@pytest.mark.parametrize(
    ("page", "address", "written", "shown"),
    [
        ("index.md", "", "[guide](docs/guide.md#weights)", "[guide](guide.md#weights)"),
        ("index.md", "", "![demo](docs/demo.png)", "![demo](demo.png)"),
        ("guide.md", "", "[home](../README.md)", "[home](index.md)"),
        ("api/scan.md", "", "[scan](../scan.md)", "[scan](../scan.md)"),
        ("guide.md", "", "[the code](../mfuser/specs.py)", "the code"),
        (
            "guide.md",
            "https://forge.example/mfuser",
            "[the code](../mfuser/specs.py)",
            "[the code](https://forge.example/mfuser/blob/main/mfuser/specs.py)",
        ),
        ("guide.md", "", "[paper](https://arxiv.org)", "[paper](https://arxiv.org)"),
        ("guide.md", "", "```toml\n[a](../b)\n```", "```toml\n[a](../b)\n```"),
    ],
)
def test_links(site: ModuleType, page: str, address: str, written: str, shown: str) -> None:
    of = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert site.on_page_markdown(written, of, SimpleNamespace(repo_url=address), None) == shown


def test_options_become_lists(site: ModuleType) -> None:
    text = (
        "Loads it.\n\nplugins: modules or\n    files. roots: folders.\n\nRaises Error: never.\n\n"
        "    code: stays\n\na: one\nb, c: two"
    )
    assert site.entries(text, ["plugins", "roots"]) == (
        "Loads it.\n\n- `plugins`: modules or files.\n- `roots`: folders.\n\n"
        "Raises Error: never.\n\n    code: stays\n\n- `a`: one\n- `b, c`: two"
    )
