"""The reference, written from the code: `python -m mfuser.cli.reference > docs/reference.md`."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mfuser import hookspecs, inference, interfaces, losses
from mfuser.cli import COMMANDS
from mfuser.plugins.components import NARROW, Component
from mfuser.plugins.discovery import GROUP, REQUIRES, installed_components
from mfuser.specs import KINDS, Spec, TokenShape

RETURNED = (
    interfaces.Stream,
    interfaces.VisionBackbone,
    interfaces.VisionLanguageBackbone,
    interfaces.TokenRefiner,
    interfaces.FusionAdapter,
    interfaces.ManyFusionAdapter,
    interfaces.TextEnhancer,
    interfaces.Decoder,
    interfaces.JoiningDecoder,
    interfaces.LastBlocks,
    interfaces.DecoderOutput,
    losses.Loss,
    losses.LossInputs,
    losses.LossParts,
    inference.Inference,
    inference.Network,
    interfaces.Dataset,
    interfaces.Sample,
    TokenShape,
)
"""The objects that specs build and that these pass to each other."""


def reference() -> str:
    """The whole reference as Markdown."""
    return "\n".join([*_head(), *_hooks(), *_specs(), *_registry(), *_interfaces(), *_commands()])


def hooks() -> dict[str, Any]:
    """Name -> function of every hook."""
    return {n: f for n, f in vars(hookspecs).items() if n.startswith("mfuser_")}


def shipped_components() -> list[Component]:
    """The components of this distribution, not of what else is installed."""
    own = {
        e.name
        for e in metadata.entry_points(group=GROUP)
        if e.dist is not None and e.dist.name == "mfuser"
    }
    return [c for c in installed_components() if c.plugin in own]


def commands(group: click.Command | None = None, path: str = "mfuser") -> Iterator[tuple[str, Any]]:
    """(what is typed, command) of every command, groups after their commands' group."""
    if group is None:
        from mfuser.cli import cli

        group = cli
    if isinstance(group, click.Group):
        context = click.Context(group)
        names = [n for n in group.list_commands(context) if n in group.commands or _ours(n)]
        for name in names:
            yield from commands(group.get_command(context, name), f"{path} {name}")
    else:
        yield path, group


def _ours(command: str) -> bool:
    """Whether a command that a plugin brings is of this distribution."""
    found = metadata.entry_points(group=COMMANDS, name=command)
    return any(e.dist is not None and e.dist.name == "mfuser" for e in found)


def registry_models() -> dict[str, type[BaseModel]]:
    """Key in a registry -> its options model: pairings, recipes, and the tables inside them."""
    from mfuser.config.pairing import PairingSpec
    from mfuser.config.recipe import RecipeSpec
    from mfuser.config.study import AdapterStudySpec, StudySpec

    found: dict[str, type[BaseModel]] = {}
    for title, model in (
        ("[pairing.NAME]", PairingSpec),
        ("[recipe.NAME]", RecipeSpec),
        ("[study.NAME]", StudySpec),
        ("[study.NAME] of adapters", AdapterStudySpec),
    ):
        found[title] = model
        for name, info in model.model_fields.items():
            for inner in _flat(info.annotation):
                if _options(inner):
                    found[f"{title} {name}"] = inner
    return found


def field_help(model: type[BaseModel]) -> dict[str, str]:
    """Field -> what the docstrings of the model and its bases say of it ("name: text")."""
    found: dict[str, str] = {}
    for cls in model.__mro__:
        if not (issubclass(cls, BaseModel) and cls.__doc__ and "__doc__" in vars(cls)):
            continue
        names = "|".join(re.escape(n) for n in model.model_fields)
        text = inspect.cleandoc(cls.__doc__)
        # "steps: …", "width, heads: …", "warmup (linear), power: …"
        one = rf"(?:{names})(?: \([^)]*\))?"
        pattern = rf"(?:^|(?<=; )|(?<=\. ))({one}(?:, {one})*): "
        parts = re.split(pattern, text, flags=re.MULTILINE)
        for keys, entry in zip(parts[1::2], parts[2::2], strict=True):
            entry = " ".join(entry.split("\n\n")[0].split()).rstrip("; ")
            for key in re.sub(r" \([^)]*\)", "", keys).split(", "):
                found.setdefault(key, entry)
    return found


def attributes(cls: type) -> list[tuple[str, str, str, str]]:
    """(name, type, default, text) of the attributes a class declares; the text is the string below
    each, or what the class's docstring says of it."""
    (tree,) = ast.parse(inspect.cleandoc(f"\n{inspect.getsource(cls)}")).body
    assert isinstance(tree, ast.ClassDef)
    told = _entries(inspect.getdoc(cls) or "")
    found = []
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue  # a method, a docstring
        name, text = statement.target.id, ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(inspect.cleandoc(str(following.value.value)).split())
        default = ast.unparse(statement.value) if statement.value else ""
        found.append((name, ast.unparse(statement.annotation), default, text or told.get(name, "")))
    return found


def _attributes(cls: type) -> list[str]:
    return [
        f"- `{name}: {kind}{f' = {default}' if default else ''}`{f': {text}' if text else ''}"
        for name, kind, default, text in attributes(cls)
        if name != "kind"
    ]


def _entries(text: str) -> dict[str, str]:
    """ "tokens: (B, N, D). grid: (h, w)." -> the text of each."""
    parts = re.split(r"(?:^|(?<=[.;] ))(\w+): ", text, flags=re.MULTILINE)
    return {
        name: " ".join(entry.split("\n\n")[0].split()).rstrip("; ")
        for name, entry in zip(parts[1::2], parts[2::2], strict=True)
    }


def _head() -> list[str]:
    return [
        "# Reference",
        "",
        "Every hook, spec field and command, written from the code by",
        "`python -m mfuser.cli.reference > docs/reference.md`; a test holds the two together. For",
        "how they are used see the [guide](guide.md) and the [tutorial for authors](plugins.md).",
        "",
        "[Hooks](#hooks) · [Specs](#specs) · [Registry](#registry) · [Interfaces](#interfaces) ·",
        "[Commands](#commands)",
        "",
    ]


def _hooks() -> list[str]:
    lines = ["## Hooks", ""]
    for name, function in hooks().items():
        lines += [f"### `{name}{inspect.signature(function)}`", "", _doc(function), ""]
    lines += [
        f"A plugin's module may set `{REQUIRES}`, the versions of mfuser it works with, e.g.",
        '`">=0.1,<0.2"`; its package may say the same in its dependencies.',
        "",
        f"- `{NARROW}`: the installed plugins to load (`timm,linear`) or to leave out (`-mine`).",
        "  Unset: all. Empty: none. What `--plugin` or `[plugins]` asks for is always loaded.",
        "",
    ]
    return lines


def _specs() -> list[str]:
    lines = ["## Specs", ""]
    components = shipped_components()
    for kind, base in KINDS.items():
        signature = _signature(base.build)  # type: ignore[attr-defined]
        lines += [f"### {kind.replace('_', '-')}: `{base.__name__}`", "", *_prose(base), ""]
        lines += [f"`build{signature}`: {_doc(base.build)}", ""]  # type: ignore[attr-defined]
        declared = [line for line in _attributes(base) if ": ClassVar" in line]
        lines += [*declared, ""] if declared else []
        lines += _table(base)
        for component in (c for c in components if c.kind == kind):
            own = {n for n in component.spec.model_fields if n not in base.model_fields}
            lines += [f"#### {kind.replace('_', '-')} `{component.name}`", ""]
            lines += [*_prose(component.spec), ""]
            lines += _table(component.spec, own)
    return lines


def _registry() -> list[str]:
    lines = ["## Registry", ""]
    for title, model in registry_models().items():
        lines += [f"### `{title}`", "", *_prose(model), "", *_table(model)]
    return lines


def _interfaces() -> list[str]:
    lines = ["## Interfaces", ""]
    for cls in RETURNED:
        lines += [f"### `{cls.__name__}`", "", *_prose(cls), ""]
        lines += _attributes(cls)
        for name, member in vars(cls).items():
            if name.startswith("_") or not inspect.isfunction(member) or not member.__doc__:
                continue
            lines += [f"- `{name}{_signature(member)}`: {_doc(member)}"]
        lines += [""]
    return [line for i, line in enumerate(lines) if line or lines[i - 1]]


def _commands() -> list[str]:
    lines = ["## Commands", "", "Every command takes `--help`.", ""]
    for path, command in commands():
        arguments = [
            f"{p.human_readable_name}{'…' * (p.nargs == -1)}"
            for p in command.params
            if isinstance(p, click.Argument)
        ]
        lines += [f"### `{' '.join([path, *arguments])}`", ""]
        lines += [" ".join(p.split()) + "\n" for p in (command.help or "").split("\n\n")]
        lines += [_option(p) for p in command.params if isinstance(p, click.Option)]
        lines.append("")
    return lines


def _option(option: click.Option) -> str:
    value = ""
    if not option.is_flag:
        choices = getattr(option.type, "choices", None)
        value = " " + (
            option.metavar or ("|".join(choices) if choices else option.type.name.upper())
        )
    text = " ".join((option.help or "").split())
    if option.show_default and option.default is not None:
        text = f"{text} Default: {option.default}.".strip()
    text += " Required." if option.required else ""
    return f"- `{', '.join(option.opts)}{value}`: {text}"


def _table(model: type[BaseModel], only: set[str] | None = None) -> list[str]:
    rows = _rows(model, only)
    if not rows:
        return []
    return ["| option | type | default | |", "|---|---|---|---|", *rows, ""]


def _rows(model: type[BaseModel], only: set[str] | None, prefix: str = "") -> list[str]:
    rows = []
    texts = field_help(model)
    for name, info in model.model_fields.items():
        if name == "name" or (only is not None and name not in only):
            continue
        kind = _type(info.annotation, info.metadata)
        text = texts.get(name, "").replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {kind} | {_default(info)} | {text} |")
        for inner in _flat(info.annotation):
            # A component's tables; those of pairings and recipes have sections of their own.
            if issubclass(model, Spec) and _options(inner):
                rows += _rows(inner, None, f"{prefix}{name}.")
    return rows


def _options(annotation: Any) -> bool:
    """Whether a field's type is a table of options, but not a component."""
    return (
        inspect.isclass(annotation)
        and issubclass(annotation, BaseModel)
        and not issubclass(annotation, Spec)
    )


def _prose(cls: type) -> list[str]:
    """The docstring without its lines on fields."""
    text = inspect.cleandoc(cls.__doc__ or "")
    fields = getattr(cls, "model_fields", {})
    kept = []
    for paragraph in re.split(r"\n\n", text):
        first = paragraph.split(":")[0]
        if fields and all(part.strip() in fields for part in first.split(",")):
            continue
        # Indented text, of examples and of code, keeps its lines.
        kept.append(paragraph if paragraph.startswith("    ") else " ".join(paragraph.split()))
    return ["\n\n".join(kept)]


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if value is PydanticUndefined:
        value = info.default_factory() if info.default_factory else ""  # type: ignore[call-arg]
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "see below"
    text = repr(value).replace("'", '"')
    text = {"True": "true", "False": "false"}.get(text, text)
    return f"`{text}`" if len(text) < 60 else f"{len(value)} values"


def _type(annotation: Any, constraints: Any = ()) -> str:
    """A field's type as written in a registry."""
    origin, given = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(given[0], given[1:])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in given if a is not type(None)))
    if origin is Literal:
        return ", ".join(f'`"{a}"`' if isinstance(a, str) else f"`{a}`" for a in given)
    if origin in (tuple, list):
        if given[-1] is Ellipsis or len(given) == 1:
            return f"list of {_type(given[0])}"
        return f"[{', '.join(_type(a) for a in given)}]"
    if origin is dict:
        return "table"
    if inspect.isclass(annotation):
        if issubclass(annotation, Spec):
            return f"{annotation.kind.replace('_', '-')} component"
        if issubclass(annotation, BaseModel):
            return "table"
    name = getattr(annotation, "__name__", str(annotation))
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    limits = [
        f"{sign} {getattr(c, key):g}"
        for c in constraints
        for key, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(c, key, None) is not None
    ]
    return " ".join([names.get(name, name), ", ".join(limits)]).strip()


def _flat(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _flat(inner)


def _signature(function: Any) -> str:
    return (
        str(inspect.signature(function))
        .replace("'", "")
        .replace("(self, ", "(")
        .replace("(self)", "()")
    )


def _doc(thing: Any) -> str:
    return " ".join(inspect.cleandoc(thing.__doc__ or "").split())


if __name__ == "__main__":
    print(reference())
