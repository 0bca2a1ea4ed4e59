"""The surface that users, plugins and programs rely on; additions to it are decided here too."""

from __future__ import annotations

from types import ModuleType

import click
import pytest

import mfuser
import mfuser.testing
import mfuser_kernels
from mfuser import hookspecs
from mfuser.cli import cli
from mfuser.cli.reference import commands
from mfuser.config.pairing import PairingSpec
from mfuser.config.registry import TABLES
from mfuser.plugins.discovery import GROUP, load_components
from mfuser.specs import KINDS

NAMES = """BackboneSpec DGSSModel DataError Dataset DatasetSpec Decoder DecoderOutput DecoderSpec
EnhancerSpec FusionAdapter FusionSpec IGNORE Inference InferenceSpec JoiningDecoder LastBlocks
Loss LossInputs LossParts LossSpec MFuserError ManyFusionAdapter Need Network Options
PairingSpec Registry Sample Stream TextEnhancer TokenRefiner TokenShape TuningSpec
VisionBackbone VisionLanguageBackbone VisionLanguageSpec VisionSpec WeightsError __version__
build_model component_of components evaluate from_pretrained hookimpl load_registry
save_pretrained train whole_batch"""
KERNELS = "Backend ScanError backends selective_scan"
TESTING = "Report Verdict check_component check_plugin conforms"

SHARED = "--json --plugin --registry"
WORK = f"--data-root --device {SHARED}"
COMMANDS = {
    "ablate": "STUDIES --axis --base --dry-run --index --launcher --launcher-set --of --out "
    f"--recipe --reuse --seeds --set --set-recipe --source --targets {WORK}",
    "bench": "PAIRING --frame --no-released --out --recipe --repeats --set --set-recipe --source "
    f"{WORK}",
    "convert": f"CHECKPOINT --out --pairing --set --source {SHARED}",
    "data check": f"DATASETS --data-root --full {SHARED}",
    "data new": f"FOLDER --classes --dry-run --name --out --pairing {SHARED}",
    "describe": f"PAIRING --set {SHARED}",
    "doctor": "--json",
    "export": f"RUN --format --out --set --weights {SHARED}",
    "evaluate": "RUN --baselines --compile --inference --limit --out --precision --set --stride "
    f"--targets --weights --window-batch --workers {WORK}",
    "list": f"KIND PATTERN --all {SHARED}",
    "plugin bench": "MODULE --component --dry-run --json --out --seeds --set --steps",
    "plugin check": "MODULE --data-root --json --pairings",
    "plugin new": "NAME --json --kind --out",
    "predict": "RUN IMAGES --classes --compile --device --inference --out --precision --recursive "
    f"--scale --scores --set --skip-bad --stride --weights --window-batch --workers {SHARED}",
    "pull": "REPO FOLDER --json --revision",
    "push": f"RUN REPO --dry-run --full --license --public --set --weights {SHARED}",
    "serve": "RUN --device --inference --longest-side --open --plugin --port --registry --set "
    "--stride --weights --window-batch",
    "train": "PAIRING --compile --no-evaluate --out --recipe --replay --requeue --resume --seed "
    f"--set --set-recipe --source --steps --targets {WORK}",
    "visualize compare": "GIVEN --count --dataset --out --recursive --scale --split --stride "
    f"--width {WORK}",
    "visualize pca": "MODEL IMAGES --device --out --recursive --scale --set --stride --width "
    f"{SHARED}",
    "visualize similarity": "RUN IMAGES --before --device --out --recursive --scale --set --stride "
    f"--text --width {SHARED}",
    "world pca": "OUT --vfm --vlm",
    "world pretrain": "TOWER --decay --json --out --save-every --seed --steps --without",
    "world probe": "NAMES --development --head --images --json --seeds --steps --train --vfm --vlm",
    "world show": "OUT",
    "world words": "--images --json --vfm --vlm",
}

PAIRING = """vfm vlm fusion tuning enhancer decoder image_size classes taps prompt merge pyramid
alignment losses"""

FIELDS = {
    "timm": "depth freeze interpolation antialias mean model options patch_resample patch_size "
    "std weights",
    "mvfuser": "every state_size project",
    "mtenhancer": "width",
    "text_mask2former": "width pixel_layers pixel_ffn layers ffn num_points",
    "streets": "split test_size domain size count seed",
}


@pytest.mark.parametrize(
    ("module", "names"), [(mfuser, NAMES), (mfuser_kernels, KERNELS), (mfuser.testing, TESTING)]
)
def test_names(module: ModuleType, names: str) -> None:
    assert sorted(module.__all__) == sorted(names.split())
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_no_other_name() -> None:
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
    assert {*TABLES} == {"pairing", "recipe", "dataset", "study"}
    streams = {"vision", "vision_language"}
    parts = {"fusion", "tuning", "enhancer", "decoder", "loss", "inference"}
    assert {*KINDS} == streams | parts | {"dataset"}
    assert {*PairingSpec.model_fields} == {*PAIRING.split()}


def test_commands() -> None:
    found = {
        path.removeprefix("mfuser "): {
            o
            for p in command.params
            for o in (p.opts if isinstance(p, click.Option) else [str(p.name).upper()])
        }
        for path, command in commands(cli)
    }
    assert found == {path: {*options.split()} for path, options in COMMANDS.items()}


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
