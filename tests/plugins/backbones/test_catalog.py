"""`mfuser list backbones`: the components, and every model one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import PositiveInt

from mfuser.plugins.discovery import components
from mfuser.specs import BackboneInfo, BackboneSpec, VisionSpec
from mfuser_plugins.backbones import catalog


def test_backbones_lists_the_components(mfuser: Callable[..., Any]) -> None:
    shown = json.loads(mfuser("list", "backbones", "--json").out)
    assert set(shown) == {"vision", "vision_language"}
    assert "timm" in {e["name"] for e in shown["vision"]}
    assert "open_clip" in {e["name"] for e in shown["vision_language"]}


def test_all_lists_models_with_their_facts(
    mfuser: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"width": 1024, "depth": 24, "patch": 14, "tokens": 1029}
    content = {
        "timm": {"vit_large_patch14_reg4_dinov2": facts},
        "open_clip": {"RN50": {"refused": "no stream of tokens"}},
    }
    monkeypatch.setattr(catalog, "known", lambda library: content[library])
    shown = json.loads(mfuser("list", "backbones", "--all", "patch14_reg4_dinov2", "--json").out)
    entries = {e["name"]: e for e in shown}
    large = entries["vit_large_patch14_reg4_dinov2"]
    assert large["component"] == "timm" and large["license"] == "apache-2.0" and large["tried"]
    assert {k: large[k] for k in facts} == facts
    small = entries["vit_small_patch14_reg4_dinov2"]
    assert not small["tried"] and small["width"] is None
    plain = mfuser("list", "backbones", "--all", "rn50")
    assert plain.code == 0 and "refused: no stream of tokens" in plain.out
    wildcard = json.loads(mfuser("list", "backbones", "--all", "hiera_*_224", "--json").out)
    assert {e["license"] for e in wildcard} == {"cc-by-nc-4.0"}
    none = mfuser("list", "backbones", "--all", "nothing")
    assert "no model's name matches 'nothing'" in none.out


def test_all_goes_with_backbones_alone(mfuser: Callable[..., Any]) -> None:
    for arguments in (("vision", "vit"), ("--all",), ("backbones", "vit")):
        outcome = mfuser("list", *arguments)
        assert outcome.code == 2 and "list backbones --all" in outcome.err


def test_a_component_without_a_catalog_lists_nothing() -> None:
    class Quiet(VisionSpec, name="quiet"):
        width: PositiveInt = 8

    assert list(Quiet.catalog()) == []
    assert BackboneInfo("a").tried is False


def test_every_module_of_the_catalog_exists() -> None:
    families = {catalog.family_of("timm", name) for name in catalog.candidates("timm")}
    assert families == set(catalog.MODULES)
    assert catalog.family_of("open_clip", "RN50") == "ModifiedResNet"
    assert catalog.family_of("open_clip", "EVA02-L-14") == "timm eva"


@pytest.mark.parametrize(
    "component, fields, license",
    [
        ("timm", {"model": "hiera_small_224.mae"}, "cc-by-nc-4.0"),
        ("timm", {"model": "hiera_small_224", "weights": "mae"}, "cc-by-nc-4.0"),
        ("timm", {"model": "hiera_small_224", "weights": "random"}, None),
        ("timm", {"model": "hiera_small_224", "weights": "no-such-tag"}, None),
        ("timm", {"model": "hiera_small_224", "weights": "nowhere.pth"}, None),
        ("open_clip", {"model": "EVA02-L-14-336", "weights": "merged2b_s6b_b61k"}, "mit"),
        ("open_clip", {"model": "ViT-B-16", "weights": "metaclip_400m"}, "cc-by-nc-4.0"),
        ("open_clip", {"model": "ViT-B-16", "weights": "laion400m_e31"}, None),
        ("open_clip", {"model": "ViT-B-16", "weights": "random"}, None),
        (
            "dual_encoder",
            {
                "vision": {"name": "timm", "model": "hiera_small_224.mae"},
                "text": {"model": "random"},
            },
            "cc-by-nc-4.0",
        ),
    ],
)
def test_license_of_the_weights_that_a_spec_names(
    component: str, fields: dict[str, Any], license: str | None
) -> None:
    kind = "vision" if component == "timm" else "vision_language"
    spec = components(kind)[component].model_validate({"name": component, **fields})
    assert isinstance(spec, BackboneSpec) and spec.license() == license


def test_describe_shows_the_license_although_it_loads_no_weights(
    mfuser: Callable[..., Any],
) -> None:
    vlm = ["--set", "vlm.model=ViT-B-16", "--set", "vlm.weights=metaclip_400m"]
    shallow = ["--set", "vfm.options.depth=1", "--set", "vlm.options.vision_cfg.layers=1"]
    ran = mfuser("describe", "dinov2-s_clip-b", *vlm, *shallow, "--json")
    licenses = {r: facts["license"] for r, facts in json.loads(ran.out)["encoders"].items()}
    assert licenses == {"vfm": "apache-2.0", "vlm": "cc-by-nc-4.0"}
