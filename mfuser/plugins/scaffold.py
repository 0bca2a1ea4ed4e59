"""A package to start a plugin from: it works before a line of it is changed."""

from __future__ import annotations

import keyword
import re
from importlib import resources, util
from pathlib import Path
from string import Template

from mfuser.errors import PluginError
from mfuser.version import __version__

KINDS = (
    *("backbone", "vlm", "fusion", "tuning", "enhancer", "decoder", "loss", "inference"),
    "dataset",
)

_COMPONENT = {"backbone": "vision", "vlm": "vision_language"}
"""The kind of component, where its name is another."""

_SUMMARY = {
    "backbone": "A plain vision transformer as the vision foundation model.",
    "vlm": "Plain transformers of patches and of words, aligned in one space.",
    "fusion": "Each encoder receives a learned share of the other's mean token.",
    "tuning": "A trained gain for each output channel of the blocks' linear layers.",
    "enhancer": "Class texts that attend to the image.",
    "decoder": "A pixel belongs to the class whose text its embedding is nearest to.",
    "loss": "Focal loss: pixels that are right already count for little.",
    "inference": "The image as it is and shifted by a few pixels; the scores are averaged.",
    "dataset": "Images and labels of the same names in two folders.",
}

_USE = {
    "backbone": 'In a registry: `vfm = { name = "$component", weights = "FILE" }`.',
    "vlm": 'In a registry: `vlm = { name = "$component", weights = "FILE" }`.',
    "fusion": 'In a registry: `fusion = { name = "$component", share = 0.1 }`.',
    "tuning": 'In a registry: `tuning = { name = "$component", last = 4 }`.',
    "enhancer": 'In a registry: `enhancer = { name = "$component", width = 64 }`.',
    "decoder": 'In a registry: `decoder = { name = "$component", width = 128 }`.',
    "loss": 'In a registry: `losses = [{ name = "$component", weight = 0.5 }]`.',
    "inference": "On the command line: `mfuser evaluate RUN --inference $component`.",
    "dataset": "On the command line: `--source $component --data-root $component=FOLDER`.",
}


def write(name: str, kind: str, folder: Path) -> list[Path]:
    """Write the package `name` (my-plugin or my_plugin) into `folder`, new or empty.

    Returns the files. Raises PluginError for a name that is not a package name or is taken,
    and for a folder that is not empty.
    """
    module = _module(name, kind)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PluginError(f"{folder} exists already and is not empty; choose another --out")
    major, minor = __version__.split(".")[:2]
    values = {
        "package": name,
        "module": module,
        "component": module,
        "Class": "".join(part.capitalize() for part in module.split("_")),
        "summary": _SUMMARY[kind],
        "version": f"{major}.{minor}",
        "below": f"{major}.{int(minor) + 1}",
        "listed": _COMPONENT.get(kind, kind),
    }
    values["use"] = Template(_USE[kind]).substitute(values)
    files = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        f"{module}.py": f"{kind}.py.txt",
        f"tests/test_{module}.py": f"{kind}_test.py.txt",
    }
    written = []
    for target, template in files.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(_template(template)).substitute(values), "utf-8")
        written.append(path)
    return written


def _template(name: str) -> str:
    return resources.files("mfuser").joinpath("plugins", "templates", name).read_text("utf-8")


def _module(name: str, kind: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise PluginError(
            f"'{name}' is not a package name: lowercase letters, digits, and single - or _ between "
            "them, e.g. my-fusion"
        )
    module = name.replace("-", "_")
    if util.find_spec(module) is not None:
        raise PluginError(
            f"a module '{module}' is installed already, and yours would hide it; choose another "
            f"name, e.g. mfuser-{name}"
        )
    from mfuser.plugins.discovery import components

    if module in components(_COMPONENT.get(kind, kind)):
        raise PluginError(
            f"a {kind} component is called '{module}' already; choose another name, e.g. my-{name}"
        )
    return module
