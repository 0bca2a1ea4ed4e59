"""Rates and decays by component, pattern and layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from mfuser import Registry, build_model, load_registry
from mfuser.engine.layers import layer_depths
from mfuser.engine.optimizer import parameter_groups, set_rates, trained
from mfuser.engine.run import resolve
from mfuser.errors import MFuserError
from mfuser.model.dgss import DGSSModel

LORA = """
[pairing.tuned]
extends = "plain"
tuning  = { name = "lora", rank = 2, encoders = ["vfm"] }

[pairing.whole]
extends = "plain"
vfm     = { freeze = false }
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_toml: str) -> Registry:
    path = tmp_path_factory.mktemp("optimizer") / "registry.toml"
    path.write_text(tiny_toml + LORA, "utf-8")
    return load_registry(path)


@pytest.fixture(scope="module")
def models(registry: Registry) -> dict[str, DGSSModel]:
    """tiny: fused, encoders frozen. whole: both encoders train, no fusion. tuned: LoRA."""
    return {
        "tiny": build_model("tiny", registry),
        "whole": build_model("plain", registry, vfm={"freeze": False}, vlm={"freeze": False}),
        "tuned": build_model("tuned", registry),
    }


def placed(registry: Registry, model: DGSSModel, *recipe: str) -> dict[str, tuple[float, float]]:
    """Parameter -> its factor on the rate and its weight decay."""
    names = {p: n for n, p in model.named_parameters()}
    groups: list[dict[str, Any]] = parameter_groups(model, registry.recipe("tiny", recipe))
    keys = [(g["factor"], g["weight_decay"]) for g in groups]
    assert len(set(keys)) == len(keys)
    found = {names[p]: key for g, key in zip(groups, keys, strict=True) for p in g["params"]}
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    return found


def test_every_parameter_has_a_component(models: dict[str, DGSSModel]) -> None:
    words = {role: {o.name: o.words for o in trained(model)} for role, model in models.items()}
    assert set(words["tiny"].values()) == {
        *(("fusion",), ("merge",), ("pyramid",), ("enhancer",), ("decoder",), ("prompt",)),
    }
    assert set(words["whole"].values()) >= {("vfm",), ("vlm",)}
    for name, own in words["tuned"].items():
        assert (own == ("vfm", "tuning")) == name.endswith((".up", ".down"))


def test_losses_that_learn_are_a_component(registry: Registry) -> None:
    model = build_model("lone", registry)
    model.criteria["own"] = torch.nn.Linear(2, 2)
    factor = {n: f for n, (f, _) in placed(registry, model, "lr_scale={losses=3}").items()}
    assert {n for n, f in factor.items() if f == 3} == {"criteria.own.weight", "criteria.own.bias"}


def test_rates_by_component_and_pattern(registry: Registry, models: dict[str, DGSSModel]) -> None:
    scale = (
        'lr_scale={decoder=10, "decoder.classify"=3, prompt=0, vfm=0.5, '
        '"encoder.vfm.*.attn"=0.1, "encoder.vfm.model.blocks.1.*"=0.2}'
    )
    factor = {
        name: found[0]
        for name, found in placed(registry, models["whole"], scale, "backbone_lr=0.7").items()
    }
    assert factor["decoder.norm.weight"] == 10 and factor["decoder.classify.weight"] == 3
    assert factor["prompt.contexts"] == 0 and factor["encoder.vfm.model.cls_token"] == 0.5
    assert factor["encoder.vfm.model.blocks.0.attn.qkv.weight"] == 0.1
    assert factor["encoder.vfm.model.blocks.0.mlp.fc1.weight"] == 0.5
    # Both patterns fit: the longer one counts, in whatever order they are written.
    assert factor["encoder.vfm.model.blocks.1.attn.qkv.weight"] == 0.2
    assert factor["encoder.vlm.model.visual.conv1.weight"] == 0.7  # backbone_lr for the rest
    assert {f for n, f in factor.items() if n.startswith("pyramid.")} == {1.0}


def test_tuning_is_a_component_inside_an_encoder(
    registry: Registry, models: dict[str, DGSSModel]
) -> None:
    found = placed(registry, models["tuned"], "lr_scale={vfm=0.5, tuning=4}")
    assert {f for n, (f, _) in found.items() if n.startswith("encoder.vfm.")} == {4.0}
    found = placed(registry, models["tuned"], "lr_scale={vfm=0.5}", "backbone_lr=0.1")
    assert {f for n, (f, _) in found.items() if n.startswith("encoder.vfm.")} == {0.5}


def test_decays_by_component_and_pattern(registry: Registry, models: dict[str, DGSSModel]) -> None:
    decays = 'weight_decay={default=0.05, decoder=0.01, "*.bias"=0}'
    decay = {n: d for n, (_, d) in placed(registry, models["whole"], decays).items()}
    assert decay["decoder.classify.weight"] == 0.01 and decay["decoder.classify.bias"] == 0
    assert decay["decoder.norm.weight"] == 0  # no_decay, whatever the table says
    assert decay["encoder.vfm.model.blocks.0.attn.qkv.weight"] == 0.05


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr_scale={decodr=10}", r"lr_scale: 'decodr' fits no parameter.*mean 'decoder'\?"),
        ("weight_decay={default=0, decodr=1}", r"weight_decay: 'decodr' fits no.*'decoder'\?"),
        ("lr_scale={tuning=2}", "nothing of the component 'tuning' trains.*decoder"),
        ("lr_scale={vfm=2}", "nothing of the component 'vfm' trains in this pairing; what does"),
        ('lr_scale={"encoder.adaptors.0"=2}', r"mean 'encoder\.adapters\.\*'\?"),
        ('lr_scale={"decoder.*.wieght"=2}', r"'decoder\.\*\.wieght' fits no parameter"),
        ('lr_scale={"x?"=2}', "'x.' fits no parameter that trains; components: .*prompt"),
        ('lr_scale={"decod*r"=1, "decode*"=2}', "both fit decoder.* equally specific"),
        ("layer_decay=0.9", "layer_decay = 0.9 changes nothing, since no encoder"),
    ],
)
def test_entries_that_fit_nothing(
    registry: Registry, models: dict[str, DGSSModel], setting: str, message: str
) -> None:
    with pytest.raises(MFuserError, match=message) as caught:
        parameter_groups(models["tiny"], registry.recipe("tiny", [setting]))
    assert "\n" not in str(caught.value)


def test_a_wrong_entry_ends_before_the_folder(
    mfuser: Any, write_registry: Any, inside: Path
) -> None:
    end = mfuser(
        *("train", "plain", "--recipe", "tiny", "--registry", write_registry()),
        *("--set-recipe", "lr_scale.decodr=10", "--out", "run"),
    )
    assert end.code == 2 and not Path("run").exists()
    assert "recipe 'tiny' on pairing 'plain': lr_scale: 'decodr' fits no parameter" in end.err


# ---- by layer


@pytest.mark.parametrize(
    "model",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "eva02_tiny_patch14_224",
        "beit_base_patch16_224",
        "vit_small_patch16_dinov3",
    ],
)
def test_layers_are_timms(registry: Registry, model: str) -> None:
    """The oracle is timm's own grouping of the same model."""
    # Of the token: a norm after pooling belongs to a classifier, which has a layer of its own.
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2, "global_pool": "token"}
    vfm = {"name": "timm", "model": model, "weights": "random", "freeze": False}
    ours = build_model("lone", registry, vfm=vfm | {"options": options})
    assert ours.encoder.vfm is not None
    theirs = timm.create_model(model, num_classes=0, **options)
    names = {p: n for n, p in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, layer_decay=0.8)
    scale = {names[p]: g["lr_scale"] for g in groups for p in g["params"]}
    factor = placed(registry, ours, "layer_decay=0.8", "lr_scale={vfm=0.5}")
    for name in dict(ours.encoder.vfm.named_parameters()):
        own = name.removeprefix("model.")
        assert factor[f"encoder.vfm.{name}"][0] == pytest.approx(0.5 * scale[own]), name
    assert len(set(scale.values())) == 4
    assert factor["decoder.norm.weight"][0] == 1.0


def test_each_tower_has_its_own_layers(models: dict[str, DGSSModel]) -> None:
    """CLIP's: two blocks of vision, one of text; final norms and projections are the last."""
    vlm = models["whole"].encoder.vlm
    assert vlm is not None
    depths = layer_depths(vlm)
    for name, depth in {
        "visual.conv1.weight": 2,
        "visual.class_embedding": 2,
        "visual.positional_embedding": 2,
        "visual.ln_pre.weight": 2,
        "visual.transformer.resblocks.0.mlp.c_proj.weight": 1,
        "visual.transformer.resblocks.1.attn.out_proj.weight": 0,
        "visual.ln_post.bias": 0,
        "visual.proj": 0,
        "token_embedding.weight": 1,
        "positional_embedding": 1,
        "transformer.resblocks.0.attn.in_proj_weight": 0,
        "ln_final.weight": 0,
        "text_projection": 0,
    }.items():
        assert depths[f"model.{name}"] == depth, name


def test_an_encoder_without_blocks(
    registry: Registry, models: dict[str, DGSSModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert models["whole"].encoder.vfm is not None

    def none() -> list[Any]:
        raise MFuserError("Own does not say which module is behind each of its 3 blocks")

    monkeypatch.setattr(models["whole"].encoder.vfm, "block_modules", none)
    with pytest.raises(MFuserError, match="layer_decay finds no layers: Own does not say which"):
        parameter_groups(models["whole"], registry.recipe("tiny", ["layer_decay=0.9"]))


# ---- over the steps


def test_the_rate_and_the_decay_of_a_step(registry: Registry, models: dict[str, DGSSModel]) -> None:
    recipe = registry.recipe(
        "tiny",
        [
            *("steps=40", "warmup=0", "schedule=constant", "lr=1e-4", "lr_scale.decoder=10"),
            *("weight_decay=0.05", "decay_schedule=cosine", "min_weight_decay=1e-5"),
        ],
    )
    groups = parameter_groups(models["tiny"], recipe)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    # SoMA's schedule as torch computes it: mmengine's is the same closed form.
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.05)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 40, eta_min=1e-5)
    for step in range(40):
        assert set_rates(optimizer, recipe, step) == 1e-4
        expected = theirs.param_groups[0]["lr"]
        now = {(g["lr"], round(g["weight_decay"], 12)) for g in optimizer.param_groups}
        assert now == {(lr, d) for lr in (1e-4, 1e-3) for d in (0.0, round(expected, 12))}
        theirs.step()
        cosine.step()


def test_a_component_that_warms_up_later(registry: Registry, models: dict[str, DGSSModel]) -> None:
    """EoMT's schedule, written out from its code: two warm-ups, two polynomials."""
    recipe = registry.recipe(
        "tiny",
        [
            *("steps=60", "warmup=10", "warmup_ratio=0", "lr_ramp.vfm=[10, 25]", "lr=2e-4"),
            *("schedule=poly", "schedule_from=warmup", "power=0.9", "min_lr=0", "lr_scale.vfm=0.5"),
        ],
    )
    model = models["whole"]
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr)
    tower = set(model.encoder.backbones["vfm"].parameters())

    def published(step: int, warmups: tuple[int, int], tower: bool) -> float:
        head, vit = warmups
        begin, length = (head, vit) if tower else (0, head)
        if step < begin:
            return 0.0
        if step < begin + length:
            return (step - begin) / length
        return float((1 - (step - begin - length) / (60 - begin - length)) ** 0.9)

    for step in range(60):
        assert set_rates(optimizer, recipe, step) == pytest.approx(
            2e-4 * published(step, (10, 15), False)
        )
        for group in optimizer.param_groups:
            later = group["params"][0] in tower
            assert {p in tower for p in group["params"]} == {later}
            assert group["lr"] == pytest.approx(
                (1e-4 if later else 2e-4) * published(step, (10, 15), later)
            )
    with pytest.raises(MFuserError, match="lr_ramp: 'decodre' fits no parameter.*decoder"):
        parameter_groups(model, registry.recipe("tiny", ["lr_ramp.decodre=[0, 2]"]))


def test_fewer_steps_shorten_ramps(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a recipe that ships: they would end after the training."""
    run = resolve(registry, "whole", "eomt", "toy", recipe_settings=["steps=40"])
    assert run.recipe.lr_ramp == {"vfm": (3, 9)} and run.recipe.warmup == 3
    assert (
        "vfm from step 2000 to 5000 of 20208; with 40 steps from 3 to 9" in capsys.readouterr().err
    )
    kept = resolve(registry, "whole", "eomt", "toy", recipe_settings=["steps=6000"])
    assert kept.recipe.lr_ramp == {"vfm": (2000, 5000)}
    with pytest.raises(MFuserError, match="full at most steps = 40"):
        resolve(registry, "whole", "eomt", "toy",
                recipe_settings=["steps=40", "lr_ramp.vfm=[1,50]"])  # fmt: skip
