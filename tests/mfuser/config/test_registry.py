"""registry.toml: layers, `extends`, `--set`, and messages that name file, table and key."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfuser import MFuserError, PairingSpec, Registry, build_model, load_registry
from mfuser.config.registry import shipped
from mfuser.config.tables import merge, parse_settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Write = Callable[..., Path]

keys = st.text("abcxyz_", min_size=1, max_size=4).filter(lambda k: k != "name")
leaves = st.integers() | st.booleans() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
tables = st.recursive(
    st.dictionaries(keys, leaves, max_size=3),
    lambda inner: st.dictionaries(keys, leaves | inner, max_size=3),
    max_leaves=12,
)


def registry(*texts: str) -> Registry:
    return Registry([(f"file{i}.toml", tomllib.loads(t)) for i, t in enumerate(texts)])


PAIR = """
[pairing.base]
vfm = { name = "timm", model = "vit_tiny_patch16_224", weights = "random", options = { depth = 2 } }
decoder = { name = "text_mask2former", width = 64 }
vlm = { name = "open_clip", model = "ViT-B-16", weights = "random" }
fusion = { name = "mvfuser", state_size = 4 }
"""


# ---- merging


@given(tables)
def test_merging_with_nothing_changes_nothing(table: dict[str, Any]) -> None:
    assert merge(table, {}) == table
    assert merge({}, table) == table
    assert merge(table, table) == table


@given(tables, tables)
def test_the_upper_table_wins_and_neither_changes(
    below: dict[str, Any], above: dict[str, Any]
) -> None:
    kept = copy.deepcopy((below, above))
    merged = merge(below, above)
    assert (below, above) == kept
    assert set(merged) == set(below) | set(above)
    for key, value in merged.items():
        if key not in above:
            assert value == below[key]
        elif not isinstance(above[key], dict):
            assert value == above[key]


@given(tables, tables, tables)
def test_merging_tables_without_scalars_in_the_way_is_associative(
    a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]
) -> None:
    def strings_free(t: dict[str, Any]) -> dict[str, Any]:  # "linear" is short for a table
        return {
            k: strings_free(v) if isinstance(v, dict) else 0 if isinstance(v, str) else v
            for k, v in t.items()
        }

    a, b, c = strings_free(a), strings_free(b), strings_free(c)
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))

    def agree(x: Any, y: Any, parts: list[Any]) -> None:
        # A scalar between two tables cuts the lower one off in one order only.
        if all(isinstance(p, dict) for p in parts):
            for key in set(x) | set(y):
                inner = [p[key] for p in parts if key in p]
                if all(isinstance(p, dict) for p in inner) or len(inner) == 1:
                    agree(x[key], y[key], inner)
        else:
            assert x == y

    agree(left, right, [a, b, c])


def test_a_table_with_a_name_replaces_its_component() -> None:
    below = {"fusion": {"name": "mvfuser", "state_size": 8}}
    assert merge(below, {"fusion": {"name": "none"}}) == {"fusion": {"name": "none"}}
    assert merge(below, {"fusion": {"every": 2}}) == {
        "fusion": {"name": "mvfuser", "state_size": 8, "every": 2}
    }
    assert merge({"decoder": "linear"}, {"decoder": {"x": 1}}) == {
        "decoder": {"name": "linear", "x": 1}
    }


# ---- --set


@given(st.lists(keys, min_size=1, max_size=3), st.integers() | st.booleans())
def test_settings_are_toml_values(path: list[str], value: int | bool) -> None:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    table: Any = parse_settings([f"{'.'.join(path)}={text}"])
    for key in path:
        assert list(table) == [key]
        table = table[key]
    assert table == value and type(table) is type(value)


@given(st.text(max_size=12))
def test_any_text_is_a_setting_or_a_clear_error(text: str) -> None:
    try:
        table = parse_settings([text])
    except MFuserError as error:
        assert "write key=value" in str(error)
    else:
        assert isinstance(table, dict) and "=" in text


def test_settings_are_taken_one_after_the_other() -> None:
    assert parse_settings(["a.b=1", "a.c=[1, 2]", "a.b=linear", "d=a=b", 'e="3"']) == {
        "a": {"b": "linear", "c": [1, 2]},
        "d": "a=b",
        "e": "3",
    }


# ---- layers and extends


def test_layers_change_single_keys_and_extends_inherits() -> None:
    spec = registry(
        PAIR,
        '[pairing.base]\nfusion.every = 2\n[pairing.mine]\nextends = "base"\ndecoder = "linear"',
    ).pairing("mine", ["fusion.state_size=16", "image_size=64"])
    assert spec.fusion.model_dump()["every"] == 2
    assert spec.fusion.model_dump()["state_size"] == 16
    assert spec.decoder.name == "linear"
    assert spec.image_size == (64, 64)


def test_extends_of_extends_from_a_later_file() -> None:
    spec = registry(
        '[pairing.c]\nextends = "b"\nimage_size = 96',
        '[pairing.b]\nextends = "base"\nimage_size = 64\nfusion = "none"',
        PAIR,
    ).pairing("c")
    assert (spec.image_size, spec.fusion.name) == ((96, 96), "none")


def test_overrides_as_a_table() -> None:
    spec = registry(PAIR).pairing("base", {"fusion": {"state_size": 2}, "decoder": "linear"})
    assert spec.fusion.model_dump()["state_size"] == 2 and spec.decoder.name == "linear"


def test_none_leaves_an_encoder_out() -> None:
    spec = registry(PAIR).pairing("base", ["vlm=none", "fusion=none", "decoder=linear"])
    assert spec.vlm is None and list(spec.encoders()) == ["vfm"]


def test_a_resolved_spec_comes_back_from_its_own_dump(tiny: Registry) -> None:
    for name in tiny.names("pairing"):
        spec = tiny.pairing(name)
        again = tiny.saved_pairing(spec.model_dump(mode="json"), (), "a checkpoint")
        assert again == spec and type(again.decoder) is type(spec.decoder), name


def test_everything_that_ships_is_valid() -> None:
    shipping = load_registry(shipped())
    for name in shipping.names("pairing"):
        assert isinstance(shipping.pairing(name), PairingSpec)
    for name in shipping.names("recipe"):
        recipe = shipping.recipe(name)
        for dataset in [*(source.name for source in recipe.mixture()), *recipe.targets]:
            assert shipping.dataset(dataset)
    for name in shipping.names("dataset"):
        assert shipping.dataset(name)


def test_a_registry_in_the_working_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_registry: Write
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "tiny" not in load_registry().names("pairing")
    file = write_registry()
    assert "tiny" in load_registry().names("pairing")
    other = write_registry('[recipe.r]\nextends = "paper"', "other.toml", bare=True)
    named = load_registry(other)
    assert "tiny" not in named.names("pairing") and named.recipe("r").steps == 20000
    assert load_registry(file).where("pairing", "tiny") == str(file)


def test_dataset_references(tiny: Registry) -> None:
    assert tiny.dataset("streets").model_dump()["domain"] == "game"
    assert tiny.dataset("streets:fog").model_dump()["domain"] == "fog"
    assert tiny.dataset("toy-night").model_dump()["count"] == 6
    assert [d.label() for d in tiny.dataset("acdc").expand()] == [
        "acdc:fog",
        "acdc:night",
        "acdc:rain",
        "acdc:snow",
    ]


def test_data_roots_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_registry: Write
) -> None:
    monkeypatch.delenv("MFUSER_DATA", raising=False)
    file = write_registry('[data]\ngta = "below/gta"\n', bare=True)
    assert load_registry(file).root("gta") == tmp_path / "below/gta"
    assert load_registry(file).root("acdc") is None
    (tmp_path / "all" / "gta").mkdir(parents=True)
    monkeypatch.setenv("MFUSER_DATA", str(tmp_path / "all"))
    assert load_registry(file).root("gta") == tmp_path / "all/gta"
    assert load_registry(file, data_roots=["/x"]).root("gta") == Path("/x/gta")
    assert load_registry(file, data_roots=["gta=/y"]).root("gta") == Path("/y")
    assert load_registry(file, data_roots=["acdc=/y"]).root("gta") == tmp_path / "all/gta"


# ---- messages

MESSAGES = [
    (
        '[pairing.p]\nextends = "bas"',
        r"file1\.toml \[pairing\.p\] extends: no .* called 'bas'",
    ),
    ('[pairing.p]\nextends = "bas"', "did you mean 'base'"),
    ("[pairing.p]\nextends = 3", r"file1\.toml \[pairing\.p\] extends: takes one name, not 3"),
    (
        '[pairing.p]\nextends = "q"\n[pairing.q]\nextends = "p"',
        r"file1\.toml \[pairing\.p\] extends: a circle: p -> q -> p",
    ),
    ('[pairing.p]\nextends = "p"', "a circle: p -> p"),
    (
        '[pairing.p]\nextends = "base"\nfusion = { name = "mvfuse" }',
        r"file1\.toml \[pairing\.p\]: fusion: .*'mvfuse'; did you mean 'mvfuser'",
    ),
    (
        '[pairing.p]\nextends = "base"\nfusion.state_sizes = 3',
        r"file1\.toml \[pairing\.p\]: fusion\.state_sizes: .*did you mean 'state_size'",
    ),
    (
        '[pairing.p]\nextends = "base"\nfusion.state_size = "eight"',
        r"file1\.toml \[pairing\.p\]: fusion\.state_size = 'eight': .*integer",
    ),
    (
        '[pairing.p]\nextends = "base"\nimage_siz = 3',
        r"file1\.toml \[pairing\.p\]: image_siz: .*did you mean 'image_size'",
    ),
    (
        '[pairing.p]\nextends = "base"\nprompt.contxt = 3',
        r"\[pairing\.p\]: prompt\.contxt: .*did you mean 'context'",
    ),
    ('[pairing.p]\nvfm = "timm"\ndecoder = "linear"', r"\[pairing\.p\]: vfm\.model: missing"),
    ('[pairing.p]\ndecoder = "linear"', "needs a 'vfm', a 'vlm' or both"),
    ('[pairing.p]\nextends = "base"\nvlm = "none"', "takes class queries from text.*add a vlm"),
    ('[pairing.p]\nextends = "base"\nclasses = ["a", "a"]', "no name twice"),
    ('[pairing.p]\nextends = "base"\ntaps = [1, 2]', "four positions"),
    # Inherited from the file below: the message names the line's own file.
    (
        '[pairing.base]\nfusion.every = 0\n[pairing.p]\nextends = "base"',
        r"file1\.toml \[pairing\.base\] \(extended by \[pairing\.p\]\): fusion\.every = 0",
    ),
]


@pytest.mark.parametrize(("text", "message"), MESSAGES)
def test_messages_name_file_table_key_and_remedy(text: str, message: str) -> None:
    with pytest.raises(MFuserError) as caught:
        registry(PAIR, text).pairing("p")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[pairings.x]\na = 1",
            r"file0\.toml: no table is called \[pairings\]; did you mean 'pair",
        ),
        ("pairing = 3", r"file0\.toml: 'pairing' is a table of tables"),
        ("[pairing]\nx = 1", r"file0\.toml: \[pairing\.x\] is a table, not 1"),
        ("[[pairing]]\nx = 1", "is a table of tables"),
        ("[plugins]\nlaod = []", r"file0\.toml \[plugins\]: laod: there is no such key"),
        ("[plugins]\nload = [3]", "takes a list of modules"),
        ("[data]\ngta = 3", r'file0\.toml \[data\]: gta = 3: write gta = "FOLDER"'),
    ],
)
def test_messages_about_the_file_as_a_whole(text: str, message: str) -> None:
    with pytest.raises(MFuserError, match=message):
        registry(text)


def test_messages_about_settings() -> None:
    reg = registry(PAIR)
    with pytest.raises(MFuserError, match=r"^--set: fusion\.state_size = 'x': "):
        reg.pairing("base", ["fusion.state_size=x"])
    with pytest.raises(MFuserError, match="^--set: fusio: .*did you mean 'fusion'"):
        reg.pairing("base", ["fusio.every=1"])
    with pytest.raises(MFuserError, match="no pairing is called 'bose'; did you mean 'base'"):
        reg.pairing("bose")
    # A rule across keys is broken by the setting and the file together; a key beside the
    # setting's is the file's.
    with pytest.raises(MFuserError, match=r"^--set on file0\.toml \[pairing\.base\]: decoder .*"):
        reg.pairing("base", ["vlm=none"])
    wrong = registry(PAIR + '[pairing.wrong]\nextends = "base"\nfusion.every = "x"')
    with pytest.raises(MFuserError, match=r"^file0\.toml \[pairing\.wrong\]: fusion\.every = 'x'"):
        wrong.pairing("wrong", ["fusion.state_size=2"])


def test_messages_about_files(tmp_path: Path, write_registry: Write) -> None:
    broken = write_registry("[pairing.x\n", "broken.toml", bare=True)
    with pytest.raises(MFuserError, match=r"broken\.toml is not valid TOML.*line 1"):
        load_registry(broken)
    with pytest.raises(MFuserError, match="there is no registry file"):
        load_registry(tmp_path / "none.toml")
    with pytest.raises(MFuserError, match="cannot be read: Is a directory"):
        load_registry(tmp_path)
    (tmp_path / "latin.toml").write_bytes("# Stra\xdfe".encode("latin-1"))
    with pytest.raises(MFuserError, match=r"latin\.toml is not UTF-8 text \(byte 6\)"):
        load_registry(tmp_path / "latin.toml")


def test_a_byte_order_mark_and_other_scripts_are_text(tmp_path: Path) -> None:
    file = tmp_path / "bom.toml"
    file.write_text('﻿[recipe."路"]\nextends = "paper"\n', "utf-8")
    assert load_registry(file).recipe("路").steps == 20000


def test_dataset_messages(tiny: Registry) -> None:
    with pytest.raises(MFuserError, match="no dataset is called 'streat'; did you mean 'streets'"):
        tiny.dataset("streat")
    with pytest.raises(MFuserError, match="'streets:fogg': domain = 'fogg'"):
        tiny.dataset("streets:fogg")
    with pytest.raises(MFuserError, match=r"\[dataset\.toy\] is a table, which takes no variant"):
        tiny.dataset("toy:fog")
    with pytest.raises(MFuserError, match="'gta' has no variants"):
        tiny.dataset("gta:fog")


def test_the_recipes_of_the_paper_are_the_released_ones() -> None:
    """Learning rates of mmcv's poly schedule with its warm-up; decay as the configurations say."""
    reg = load_registry()
    paper, clip = reg.recipe("paper"), reg.recipe("paper-clip")

    def released(step: int) -> float:
        rate = (1e-4 - 1e-6) * (1 - step / 20000) ** 0.9 + 1e-6
        return rate * (1 - (1 - min(step / 1500, 1)) * (1 - 1e-6))

    for step in (0, 1, 749, 1499, 1500, 10000, 19999):
        assert paper.lr * paper.rate(step) == pytest.approx(released(step), rel=1e-9)
    assert (paper.weight_decay, paper.no_decay) == (1e-5, ("norm", "level_embed", "query_embed"))
    assert (clip.weight_decay, clip.no_decay) == (1e-4, ("norm",))
    assert paper.scored == "all" and paper.augmentation.keep == "last"
    tqdm, rein = reg.recipe("tqdm"), reg.recipe("rein")
    assert (tqdm.lr, tqdm.lr * tqdm.backbone_lr, tqdm.batch_size) == pytest.approx((1e-5, 1e-6, 8))
    assert rein.rate(0) == 1 and rein.rate(20000) == pytest.approx(0.5**0.9)
    soma = reg.recipe("soma")
    # mmengine's CosineAnnealingParamScheduler, begin = 0, end = 40000, at its half and its end.
    assert [soma.decay_at(0.05, step) for step in (0, 20000, 40000)] == pytest.approx(
        [0.05, 0.025005, 1e-5]
    )
    assert soma.source == "gta" and soma.ema is not None and soma.ema.at(12000) == 0
    images = {"gta": 24966, "synthia": 9400, "urbansyn": 7539}
    assert {s.name: s.weight for s in reg.recipe("three-sources").mixture()} == pytest.approx(
        {name: count / sum(images.values()) for name, count in images.items()}, abs=5e-4
    )
    same = {"weight_decay": paper.weight_decay, "no_decay": paper.no_decay}
    assert clip.model_copy(update=same) == paper


def test_build_model_takes_overrides_with_a_name_only(tiny: Registry) -> None:
    with pytest.raises(MFuserError, match="a resolved spec is taken as it is"):
        build_model(tiny.pairing("plain"), fusion="none")
    model = build_model("plain", tiny, image_size=32, vfm={"options": {"depth": 1}})
    assert model.encoder.vfm is not None
    assert model.encoder.vfm.depth == 1 and model.encoder.vfm.image_size == (32, 32)
