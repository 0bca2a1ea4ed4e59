"""Every kind of table, every kind of mistake, from wherever it comes: one sentence with its
place, the key, what is allowed for that component, and the nearest name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError, field_validator
from pydantic_core import PydanticCustomError

from mfuser import MFuserError, Options, PairingSpec, build_model, load_registry
from mfuser.config.study import StudySpec
from mfuser.config.tables import Table, located, parse_settings
from mfuser.errors import brief
from mfuser.study.grid import variants

Write = Callable[..., Path]

# Of each kind: the key of a pairing that holds it, a table that is right, a key misspelled and the
# right one, a value of the wrong type, and another key that this component takes.
KINDS: dict[str, tuple[str, dict[str, Any], str, str, tuple[str, Any], str]] = {
    "vision": (
        "vfm",
        {"name": "timm", "model": "vit_tiny_patch16_224", "weights": "random"},
        *("modle", "model"),
        ("patch_size", "big"),
        "patch_resample",
    ),
    "vision-language": (
        "vlm",
        {"name": "open_clip", "model": "ViT-B-16", "weights": "random"},
        *("tokeniser", "tokenizer"),
        ("freeze", [1]),
        "tanh_gelu",
    ),
    "fusion": (
        "fusion",
        {"name": "mvfuser", "state_size": 2},
        *("state_sizes", "state_size"),
        ("state_size", "eight"),
        "bidirectional",
    ),
    "tuning": ("tuning", {"name": "lora"}, "rnak", "rank", ("rank", "four"), "encoders"),
    # "cross_attention" is a fusion component, too, with other options.
    "enhancer": (
        "enhancer",
        {"name": "cross_attention", "width": 32},
        *("widht", "width"),
        ("heads", 1.5),
        "gamma_init",
    ),
    "decoder": (
        "decoder",
        {"name": "text_mask2former", "width": 32},
        *("layer", "layers"),
        ("layers", "few"),
        "pixel_ffn",
    ),
}
MISTAKES = ("unknown key", "wrong type", "unknown name", "missing name", "no table")


def mistaken(kind: str, mistake: str) -> tuple[str, dict[str, Any] | int, str]:
    """The key of the pairing, its table with one mistake, and the message after the place."""
    key, table, wrong, right, (option, value), other = KINDS[kind]
    name = table["name"]
    # A vision-language model may serve as VFM, too.
    what = "vision or vision-language" if kind == "vision" else kind
    if mistake == "unknown key":
        near = rf"there is no such key; did you mean '{right}'\? \({kind} '{name}' takes .*{other}"
        return key, {**table, wrong: 1}, rf"{key}\.{wrong}: {near}"
    if mistake == "wrong type":
        given = re.escape(repr(value))
        return key, {**table, option: value}, rf"{key}\.{option} = {given}: input should be "
    if mistake == "unknown name":
        message = rf"no {what} component is called '{name}x'; did you mean '{name}'\?"
        return key, {**table, "name": f"{name}x"}, f"{key}: {message}"
    if mistake == "missing name":
        unnamed = {k: v for k, v in table.items() if k != "name"}
        return key, unnamed, rf"{key}: the {what} component has no 'name'; available: .*{name}"
    return key, 3, rf"{key}: expected the name of a {what} component, .*, not 3"


every = pytest.mark.parametrize("mistake", MISTAKES)
# What is laid over a component that has a name takes its name from there.
named = pytest.mark.parametrize("mistake", [m for m in MISTAKES if m != "missing name"])
kinds = pytest.mark.parametrize("kind", KINDS)

BASE = """
[pairing.mine]
image_size = [64, 96]
decoder = "linear"

[pairing.mine.vlm]
name    = "open_clip"
model   = "ViT-B-16"
weights = "random"
"""


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return repr(value).replace("'", '"')


def check(said: str, place: str, message: str) -> None:
    assert re.fullmatch(f"{place}{message}.*", said), said
    assert "\n" not in said


@kinds
@every
def test_from_a_registry_file(write_registry: Write, kind: str, mistake: str) -> None:
    key, table, message = mistaken(kind, mistake)
    lines = [line for line in BASE.splitlines() if line.split(" ")[0] != key]
    if key == "vlm":
        lines = [line for line in lines[:4]]
    lines.insert(3, f"{key} = {toml(table)}")
    file = write_registry("\n".join(lines) + "\n", bare=True)
    with pytest.raises(MFuserError) as caught:
        load_registry(file).pairing("mine")
    check(str(caught.value), rf"{file}:4 \[pairing\.mine\]: ", message)


@kinds
@named
def test_from_the_command_line(mfuser: Any, write_registry: Write, kind: str, mistake: str) -> None:
    key, table, message = mistaken(kind, mistake)
    command = ["describe", "tiny", "--registry", write_registry()]
    result = mfuser(*command, "--set", f"{key}={toml(table)}")
    assert result.code == 2 and result.out == ""
    check(result.err.strip(), r"mfuser: --set: ", message)


@kinds
@every
def test_from_python(tiny: Any, kind: str, mistake: str) -> None:
    key, table, message = mistaken(kind, mistake)
    if mistake != "missing name":
        with pytest.raises(MFuserError) as caught:
            build_model("tiny", tiny, **{key: table})
        check(str(caught.value), "build_model: ", message)
    given = {**tiny.raw("pairing", "tiny"), key: table}
    with pytest.raises(MFuserError) as caught:
        PairingSpec(**given)
    check(str(caught.value), "PairingSpec: ", message)


@kinds
@named
def test_from_a_study(write_registry: Write, kind: str, mistake: str) -> None:
    key, table, message = mistaken(kind, mistake)
    axis = f"{key} = [{toml(table)}]"
    study = f'\n[study.s]\nbase = "tiny"\nrecipe = "tiny"\naxes = {{ {axis} }}\n'
    file = write_registry(study)
    registry = load_registry(file)
    spec = registry.study("s")
    assert isinstance(spec, StudySpec)
    with pytest.raises(MFuserError) as caught:
        variants(registry, "s", spec)
    check(str(caught.value), rf"{file}:\d+ \[study\.s\], {key} = [^:]*: ", message)


# ---- tables other than components, and tables on tables


def refused(write_registry: Write, text: str, resolve: Callable[[Any], Any]) -> tuple[str, str]:
    """The file, and what is said of it; line 1 is the first of `text`."""
    file = write_registry(text, bare=True)
    below = file.with_name("below.toml")
    below.write_text(BASE + '[recipe.base]\nsteps = 1\nwarmup = 0\n[dataset.toy]\nname = "streets"')
    with pytest.raises(MFuserError) as caught:
        resolve(load_registry(below, file))
    assert "\n" not in str(caught.value)
    return str(file), str(caught.value)


EXTENDING = [
    # Options without a name, over a component that has one: that component's are listed.
    (
        '[pairing.p]\nextends = "mine"\nenhancer = "cross_attention"\n'
        '[pairing.q]\nextends = "p"\nenhancer = { widht = 64 }',
        r":6 \[pairing\.q\]: enhancer\.widht: there is no such key; did you mean 'width'\? "
        r"\(enhancer 'cross_attention' takes dropout, gamma_init, heads, layers, width\)",
    ),
    (
        '[pairing.p]\nextends = "mine"\nfusion = "cross_attention"\n'
        '[pairing.q]\nextends = "p"\n[pairing.q.fusion]\nranks = 2',
        r":7 \[pairing\.q\]: fusion\.ranks: .*'rank'\? \(fusion 'cross_attention' takes .*tokens",
    ),
    (
        '[pairing.q]\nextends = "mine"\nvlm.zzz = 1',
        r":3 \[pairing\.q\]: vlm\.zzz: there is no such key; vision-language 'open_clip' takes a",
    ),
    # A mistake in a table that is extended is named where it is written.
    (
        '[pairing.p]\nextends = "mine"\nvlm.freeze = 3\n[pairing.q]\nextends = "p"',
        r":3 \[pairing\.p\] \(extended by \[pairing\.q\]\): vlm\.freeze = 3: input should be",
    ),
    (
        '[pairing.q]\nextends = "mine"\nvfm = "mvfuser"',
        r":3 \[pairing\.q\]: vfm: no vision or .* is called 'mvfuser'; it is a fusion component",
    ),
    (
        '[pairing.q]\nextends = "mine"\nvfm = "timm"',
        r":3 \[pairing\.q\]: vfm\.model: missing; vision 'timm' needs it",
    ),
    (
        '[pairing.q]\nextends = "mine"\nprompt.contxt = 3',
        r":3 \[pairing\.q\]: prompt\.contxt: .*'context'\? \(this table takes context, ids, sl",
    ),
    (
        '[pairing.q]\nextends = "mine"\nfusion = { name = "mvfuser", bidirectional = "both" }',
        r":3 .*: fusion\.bidirectional = 'both': input should be a valid boolean.* or 'sum'",
    ),
    ('[pairing.q]\nextends = ["a"]', r":2 \[pairing\.q\] extends: takes one name, not \['a'\]"),
    ('[pairing.q]\nextends = "mime"', r":2 \[pairing\.q\] extends: .* called 'mime'; .* 'mine'\?"),
]


@pytest.mark.parametrize(("text", "message"), EXTENDING)
def test_options_that_extend_others(write_registry: Write, text: str, message: str) -> None:
    file, said = refused(write_registry, text, lambda r: r.pairing("q"))
    assert re.match(re.escape(file) + message, said), said


OTHERS: list[tuple[str, str, str]] = [
    ("recipe", '[recipe.x]\nextends = "base"\nstep = 3', r":3 \[recipe\.x\]: step: .*'steps'\?"),
    ("recipe", '[recipe.x]\nsteps = "few"', r":2 \[recipe\.x\]: steps = 'few': input should be a "),
    ("recipe", "[recipe.x]\nlr = 1e-4", r":1 \[recipe\.x\]: steps: missing"),
    ("recipe", '[recipe.x]\nextends = "bas"', r":2 \[recipe\.x\] extends: no recipe.*'base'\?"),
    (
        "recipe",
        '[recipe.x]\nextends = "base"\naugmentation = { flop = 1 }',
        r":3 \[recipe\.x\]: augmentation\.flop: there is no such key; did you mean 'flip'\?",
    ),
    (
        "dataset",
        '[dataset.x]\nname = "streets"\nsise = 3',
        r":3 \[dataset\.x\]: sise: .*'size'\? \(dataset 'streets' takes count, domain, ",
    ),
    (
        "dataset",
        '[dataset.x]\nname = "streets"\ncount = "few"',
        r":3 \[dataset\.x\]: count = 'few': input should be a valid integer",
    ),
    (
        "dataset",
        '[dataset.x]\nname = "street"',
        r":1 \[dataset\.x\]: no dataset component is called 'street'; did you mean 'streets'\?",
    ),
    (
        "dataset",
        "[dataset.x]\ncount = 3",
        r":1 \[dataset\.x\]: the dataset component has no 'name'; available: acdc, .*streets",
    ),
    (
        "dataset",
        '[dataset.x]\nextends = "toy"\ndomain = "fogg"',
        r":3 \[dataset\.x\]: domain = 'fogg': input should be .*'fog'",
    ),
    (
        "study",
        '[study.x]\nbase = "mine"\naxis = { fusion = ["none"] }',
        r":1 \[study\.x\]: axes: missing|:3 \[study\.x\]: axis: there is no .*'axes'\?",
    ),
    (
        "study",
        '[study.x]\nbase = "mine"\nseeds = "a"\naxes = { fusion = ["none"] }',
        r":3 \[study\.x\]: seeds = 'a': input should be",
    ),
    ("study", '[study.x]\nkind = "trainin"', r":2 \[study\.x\]: kind = 'trainin': .*'training'\?"),
    ("data", "[data]\n\ngta = 3", r""":3 \[data\]: gta = 3: write gta = "FOLDER""" + '"'),
    ("data", "data = 3", r":1: \[data\] is a table of folders"),
    ("plugins", "[plugins]\nlaod = []", r":1 \[plugins\]: laod: there is no such key; write load"),
    ("plugins", "[plugins]\nload = 3", r":1 \[plugins\]: load = 3: takes a list of modules"),
    (
        "plugins",
        '[plugins]\n\nload = ["no.py"]',
        r":3 \[plugins\]: plugin '.*no\.py' cannot be used: there is no file .*no\.py",
    ),
    ("", "[pairings.x]\na = 1", r":1: no table is called \[pairings\]; did you mean 'pairing'\?"),
    ("", "\nrecipe = 3", r":2: 'recipe' is a table of tables: \[recipe\.NAME\]"),
    ("", "[recipe]\n\nx = 3", r":3: \[recipe\.x\] is a table, not 3"),
]


@pytest.mark.parametrize(("table", "text", "message"), OTHERS)
def test_every_other_table(write_registry: Write, table: str, text: str, message: str) -> None:
    def resolve(registry: Any) -> None:
        getattr(registry, table)("x")

    file, said = refused(write_registry, text, resolve)
    assert re.match(re.escape(file) + f"({message})", said), said


def test_plugins_load_in_the_order_in_which_they_are_asked_for(write_registry: Write) -> None:
    """Those of the command line first; each once. (A run records them in this order.)"""
    names = ["mfuser_plugins.fusion.mvfuser", "mfuser_plugins.fusion.none"]
    file = write_registry(f'[plugins]\nload = ["{names[0]}", "{names[1]}"]', bare=True)
    assert load_registry(file, plugins=[names[1]]).plugins == (names[1], names[0])


def test_a_folder_stated_for_a_name_like_it_is_mentioned(write_registry: Write) -> None:
    file = write_registry('[data]\ncityscape = "somewhere"', bare=True)
    registry = load_registry(file, data_roots=["acdd=/x"])
    said = str(registry.unknown_root("cityscapes"))
    assert "the folder of dataset 'cityscapes' is not known (a folder is stated for 'citysc" in said
    assert "(a folder is stated for 'acdd')" in str(registry.unknown_root("acdc"))
    assert "is not known: give" in str(registry.unknown_root("gta"))


def test_options_of_a_study_on_the_command_line(mfuser: Any, write_registry: Write) -> None:
    study = '\n[study.s]\nbase = "plain"\nrecipe = "tiny"\naxes = { fusion = ["none"] }\n'
    command = ["ablate", "s", "--dry-run", "--registry", write_registry(study)]
    for options, message in (
        (["--seeds", "a"], r"mfuser: --seeds: seeds\.0 = 'a': input should be a valid integer"),
        (["--axis", "fuson=none"], r".*--axis on .*toml:\d+ \[study.*axis 'fuson' .*'fusion'"),
        (
            ["--set", "pyramid.widht=8"],
            r".*registry\.toml:\d+ \[study\.s\].*pyramid\.widht: .*'wid",
        ),
        (["--set-recipe", "lrr=1"], r".*\.toml:\d+ \[study\.s\].*: lrr: .*'lr'\?"),
    ):
        result = mfuser(*command, *options)
        assert result.code == 2 and re.match(message, result.err), result.err


LINES = '''# a comment
[pairing.p]
vfm = { name = "timm",
  model = "vit" }
taps = [
  0, 1,
]
text = """
[pairing.q]
a = 1
"""
fusion.every = 2
"quoted key".x = 1

[pairing."a.b"]
decoder = "linear"
[[list]]
x = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("pairing.p", 2),
        ("pairing.p.taps", 5),
        ("pairing.p.text", 8),
        ("pairing.p.fusion.every", 12),
        ("pairing.p.fusion.other", 12),
        ("pairing.p.quoted key.x", 13),
        ("pairing.p.nothing", 2),
        ("pairing.q", 2),
        ("list", 16),
        ("nothing", None),
    ],
)
def test_keys_are_found_by_line(tmp_path: Path, path: str, line: int | None) -> None:
    file = tmp_path / "lines.toml"
    file.write_text(LINES.replace('"timm",\n  model', '"timm", model').replace("= 1\n\n", "= 1\n"))
    expected = str(file) if line is None else f"{file}:{line if line < 4 else line - 1}"
    assert located(str(file), tuple(path.split("."))) == expected


def test_errors_of_a_plugin_s_own_kind_are_kept() -> None:
    class Even(Options):
        width: int
        depth: int = 1

        @field_validator("width")
        @classmethod
        def _even(cls, width: int) -> int:
            if width % 2:
                raise PydanticCustomError("odd", "{given} is {odd}", {"given": width, "odd": "odd"})
            return width

    with pytest.raises(ValidationError) as caught:
        Even.model_validate({"width": 3, "dept": 2})
    assert [e["type"] for e in caught.value.errors()] == ["odd", "unknown_key"]
    assert brief(caught.value) == "width = 3: 3 is odd (and 1 more)"


def test_settings_of_one_option_are_one_table() -> None:
    table: Table = parse_settings(["fusion={name='mvfuser', state_size=2}", "fusion.every=2"])
    assert table == {"fusion": {"name": "mvfuser", "state_size": 2, "every": 2}}
