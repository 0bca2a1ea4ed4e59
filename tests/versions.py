"""Requirements of the two environments of `make test-versions`.

    python tests/versions.py lowest    every core dependency at its lowest allowed version
    python tests/versions.py newest    every core dependency as pip finds it, and the extras

Read from pyproject.toml, one requirement a line, as `pip install -r` takes them. The lowest set
leaves out the extra `hf`: transformers itself needs newer versions of what others allow older.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
TOOLS = ("pytest", "hypothesis")


def requirements(which: str) -> Iterator[str]:
    project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"]]
    if which == "newest":
        wanted += [*extras["hf"], *extras["minilm"]]
    tools = [line for line in extras["dev"] if Requirement(line).name in TOOLS]
    for line in (*wanted, *tools):
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if which == "lowest":
            (lowest,) = (s.version for s in requirement.specifier if s.operator == ">=")
            yield f"{requirement.name}=={lowest}"
        else:
            yield line


if __name__ == "__main__":
    if sys.argv[1:] not in (["lowest"], ["newest"]):
        sys.exit(__doc__)
    print("\n".join(requirements(sys.argv[1])))
