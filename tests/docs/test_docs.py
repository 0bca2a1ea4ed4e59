"""The documents: the reference is that of the code, and every block of code runs or parses."""

from __future__ import annotations

import ast
import builtins
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mfuser.cli import reference
from mfuser.config.registry import Registry, load_registry

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "examples" / "mfuser-bottleneck" / "mfuser_bottleneck.py"
RUN_WHOLLY = {"README.md", "guide.md", "plugins.md", "scan.md"}
"""Documents without a block that needs a run or a file of the reader's."""
TOOLS = {"accelerate", "cd", "git", "make", "mkdir", "pip", "pytest", "python", "srun", "torchrun"}


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    text = path.read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def having(language: str) -> list[Path]:
    return [f for f in FILES if blocks(f, language)]


def label(path: Path) -> str:
    return path.name


def test_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "reference.md").read_text("utf-8")
    made = reference.reference() + "\n"
    for n, (a, b) in enumerate(zip(written.splitlines(), made.splitlines(), strict=False), 1):
        assert a == b, f"line {n}: run `python -m mfuser.cli.reference > docs/reference.md`"
    assert written == made, "run `python -m mfuser.cli.reference > docs/reference.md`"


def test_all_hooks_specs_and_commands_are_documented() -> None:
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    for name, function in reference.hooks().items():
        assert function.__doc__ and f"### `{name}(" in text
    for component in reference.shipped_components():
        assert component.spec.__doc__ and f"`{component.name}`\n" in text
        for field in component.spec.model_fields:
            assert field == "name" or f"| `{field}` |" in text
    for title, model in reference.registry_models().items():
        assert model.__doc__ and f"### `{title}`" in text
    for path, command in reference.commands():
        assert command.help, f"{path} says nothing of itself"
        assert f"### `{path}" in text
        for option in command.params:
            if isinstance(option, click.Option) and option.name not in ("help", "version"):
                assert option.opts[0] in text
                assert option.help or option.show_default, f"{path} {option.opts[0]}: no help"


@pytest.mark.parametrize("path", having("python"), ids=label)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("\n".join(pairings(path)), "utf-8")
    name = f"documented_{path.stem}"
    module = type(sys)(name)
    monkeypatch.setitem(sys.modules, name, module)
    for block in blocks(path, "python"):
        code = compile(block, str(path), "exec")
        if path.name not in RUN_WHOLLY and asks_for(block, module.__dict__):
            imports = [n for n in ast.parse(block).body if isinstance(n, ast.ImportFrom)]
            code = compile(ast.Module(imports, []), str(path), "exec")
        exec(code, module.__dict__)


def asks_for(block: str, known: dict[str, object]) -> bool:
    """Whether a block reads a run of the reader's, or a name that nothing before it makes."""
    names = [n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Name)]
    made = (
        {n.id for n in names if not isinstance(n.ctx, ast.Load)} | set(known) | set(dir(builtins))
    )
    imported = re.findall(r"import (.+)$", block, re.MULTILINE)
    made |= {name.strip() for line in imported for name in line.split(",")}
    return '"runs/' in block or any(n.id not in made for n in names)


def pairings(path: Path) -> Iterator[str]:
    return (b for b in blocks(path, "toml") if "[pairing." in b)


@pytest.mark.parametrize("path", having("toml"), ids=label)
def test_toml_blocks_resolve(path: Path, tmp_path: Path) -> None:
    """Tables of a registry are laid over the shipped one, and each is resolved."""
    for n, block in enumerate(blocks(path, "toml")):
        if "[project" in block:
            assert 'mfuser_bottleneck"' in block  # the tutorial's pyproject.toml
            continue
        file = tmp_path / f"{n}.toml"
        file.write_text(block, "utf-8")
        registry = load_registry(file, plugins=[str(TUTORIAL)])
        for kind in ("pairing", "recipe", "dataset"):
            for name in registry.names(kind):
                if registry.where(kind, name) == str(file):
                    getattr(registry, kind)(name)


@pytest.mark.parametrize("path", having("sh"), ids=label)
def test_shell_blocks_parse(path: Path) -> None:
    """Every command of ours has these options and arguments; every other is a known tool."""
    registry = load_registry(plugins=[str(TUTORIAL)])
    variables: dict[str, str] = {}
    for line in commands(path):
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line.replace(".venv/bin/", ""), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if not words:
            continue
        if "-m" in words and "mfuser" in words:  # torchrun -m mfuser train …
            words = words[words.index("mfuser") :]
        if words[0] == "mfuser":
            parse(line, words[1:], registry, path.read_text("utf-8"))
            continue
        assert words[0] in TOOLS, line
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
            assert set(words[1:]) <= set(targets), line
        for word in words[1:]:
            if word.endswith(".py") and "/" in word:
                assert (ROOT / word).is_file(), line


def commands(path: Path) -> Iterator[str]:
    """The commands of the shell blocks, continued lines joined."""
    for block in blocks(path, "sh"):
        joined = re.sub(r"\\\n\s*", " ", block)
        yield from (x for x in joined.splitlines() if x.split("#")[0].strip())


def parse(line: str, words: list[str], registry: Registry, text: str) -> None:
    from mfuser.cli import cli

    command: click.Command = cli
    words = [w for w in words if w != "…"]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"{line}: there is no command '{name}'"
        command = found
    try:
        # With the settings of the whole: a command keeps the names of its help option.
        context = command.make_context("mfuser", list(words), **cli.context_settings)
    except click.exceptions.Exit:
        return  # --help, --version
    except click.ClickException as error:
        raise AssertionError(f"{line}: {error.format_message()}") from error
    own = [ROOT / name for name in context.params.get("registries", ()) if "examples/" in name]
    if own:
        registry = load_registry(*own)
    pairing = context.params.get("pairing")
    if pairing in registry.names("pairing") and not context.params.get("plugins"):
        registry.pairing(pairing, list(context.params.get("settings", ())))
    for study in context.params.get("studies", ()):
        if study.islower():
            assert study in registry.names("study") or f"[study.{study}]" in text, line


def test_links_lead_somewhere() -> None:
    for path in FILES:
        text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith(("http://", "https://")) and not target.endswith(".png"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_tutorial_is_the_example() -> None:
    """Every class and function of docs/plugins.md is that of the example, but for docstrings."""
    example = definitions(TUTORIAL.read_text("utf-8"))
    told = definitions("\n".join(blocks(ROOT / "docs" / "plugins.md", "python")))
    told.pop("test_conforms")
    assert told.keys() == example.keys()
    for name, text in told.items():
        assert text == example[name], f"{name} differs from {TUTORIAL.name}"


def definitions(source: str) -> dict[str, str]:
    """Top-level classes and functions as text, without docstrings and comments."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ClassDef) and ast.get_docstring(inner):
                    inner.body = inner.body[1:]
            found[node.name] = ast.unparse(node)
    return found
