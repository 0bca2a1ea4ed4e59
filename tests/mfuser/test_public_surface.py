"""What users, plugins and programs rely on. More may come; what is here stays."""

from __future__ import annotations

import click
import pytest

import mfuser
from mfuser import hookspecs
from mfuser.cli import cli
from mfuser.pairing import PairingSpec
from mfuser.plugins import GROUP, load_components
from mfuser.registry import TABLES
from mfuser.specs import KINDS

NAMES = """BackboneSpec DGSSModel DataError Dataset DatasetSpec Decoder DecoderOutput DecoderSpec
EnhancerSpec FusionAdapter FusionSpec IGNORE MFuserError Options PairingSpec Registry Sample Stream
TextEnhancer TokenShape VisionBackbone VisionLanguageBackbone VisionLanguageSpec VisionSpec
WeightsError __version__ build_model component_of components hookimpl load_registry"""

SHARED = "--json --plugin --registry"
COMMANDS = {
    "list": f"KIND {SHARED}",
    "describe": f"PAIRING --set {SHARED}",
    "data check": f"DATASETS --data-root {SHARED}",
    "doctor": "--json",
    "train": f"PAIRING --data-root --device --no-evaluate --out --recipe --resume --seed --set "
    f"--set-recipe --source --steps --targets {SHARED}",
    "evaluate": f"RUN --baselines --data-root --device --limit --out --set --stride --targets "
    f"{SHARED}",
    "predict": f"RUN IMAGES --device --out --scale --set --skip-bad --stride {SHARED}",
}

PAIRING = "vfm vlm fusion enhancer decoder image_size classes taps prompt merge pyramid alignment"

FIELDS = {
    "timm": "depth freeze interpolation antialias mean model options patch_resample patch_size "
    "std weights",
    "mvfuser": "every state_size project",
    "mtenhancer": "width",
    "text_mask2former": "width pixel_layers pixel_ffn layers ffn num_points",
    "streets": "split test_size domain size count seed",
}


def test_names() -> None:
    assert set(NAMES.split()) <= set(mfuser.__all__)
    for name in mfuser.__all__:
        assert getattr(mfuser, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mfuser.nothing  # noqa: B018


def test_every_public_name_is_typed() -> None:
    from pathlib import Path

    source = Path(mfuser.__file__).read_text("utf-8")
    for name in set(mfuser.__all__) - {"__version__"}:
        assert f"import {name} as {name}" in source, name


def test_hooks_tables_and_kinds() -> None:
    assert [n for n in vars(hookspecs) if n.startswith("mfuser_")] == ["mfuser_components"]
    assert mfuser.hookimpl.project_name == "mfuser" and GROUP == "mfuser"
    assert {"pairing", "recipe", "dataset", "study"} <= set(TABLES)
    assert {"vision", "vision_language", "fusion", "enhancer", "decoder", "dataset"} <= set(KINDS)
    assert set(PAIRING.split()) <= set(PairingSpec.model_fields)


@pytest.mark.parametrize("path", COMMANDS)
def test_commands(path: str) -> None:
    command: click.Command = cli
    for name in path.split():
        assert isinstance(command, click.Group)
        command = command.commands[name]
    found = {
        p.opts[-1] if isinstance(p, click.Option) else str(p.name).upper() for p in command.params
    }
    assert set(COMMANDS[path].split()) <= found


@pytest.mark.parametrize("name", FIELDS)
def test_options_of_components(name: str) -> None:
    components = load_components()
    spec = next(components.kind(kind)[name].spec for kind in KINDS if name in components.kind(kind))
    assert set(FIELDS[name].split()) <= set(spec.model_fields)


def test_every_component_and_option_is_explained() -> None:
    components = load_components()
    for kind in KINDS:
        for name, component in components.kind(kind).items():
            own = component.spec.__doc__ or ""
            inherited = "".join(base.__doc__ or "" for base in component.spec.__mro__)
            assert own.strip(), name
            for field in component.spec.model_fields:
                assert field == "name" or field in inherited, f"{kind} {name}: {field}"
