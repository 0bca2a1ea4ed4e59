"""A list of VFMs beside a VLM: the same as one, three times; and a list of one is that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser import (
    DGSSModel,
    FusionSpec,
    MFuserError,
    Registry,
    TokenShape,
    build_model,
    load_registry,
)
from mfuser.config.recipe import RecipeSpec
from mfuser.engine import checkpoints
from mfuser.engine.checkpoints import Checkpoint
from mfuser.engine.optimizer import parameter_groups
from mfuser.interfaces import ManyFusionAdapter
from mfuser.model.assembly import sketch
from mfuser.model.encoder import resample
from mfuser.reporting.adapter_cost import adapter_cost
from mfuser.reporting.describe import describe, render

DINO = {
    "name": "timm",
    "model": "vit_tiny_patch16_224",
    "weights": "random",
    "options": {"embed_dim": 32, "depth": 3, "num_heads": 2},
}
DEPTH = {
    "name": "transformers",
    "model": "random",
    "patch_size": 8,
    "config": {
        **{"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "patch_size": 14, "image_size": 56, "mlp_ratio": 2},
    },
}
SIZE = (64, 96)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, *SIZE), torch.randint(0, 19, (2, *SIZE))


@pytest.fixture(scope="module")
def three(tiny: Registry) -> DGSSModel:
    """DINOv2's and Depth Anything's kind of tower beside a VLM, of other widths, depths, grids."""
    return build_model("tiny", tiny, vfm=[DINO, DEPTH])


def test_names_and_a_step(three: DGSSModel) -> None:
    assert list(three.encoder.backbones) == ["vfm_1", "vfm_2", "vlm"]
    assert three.encoder.vfm is None and three.encoder.tap_channels == 32 + 48 + 48
    assert three.encoder.grid == (8, 12)  # the finest
    three.train()
    for _ in range(2):
        sum(three(*batch()).values()).backward()  # type: ignore[union-attr]
    trained = {n: p for n, p in three.named_parameters() if p.requires_grad}
    assert not [n for n in trained if n.startswith(("encoder.vfm", "encoder.vlm"))]
    # The second VFM is as wide as the VLM: only the first is mapped.
    assert [n for n in trained if n.startswith("encoder.project_vfm")] == [
        "encoder.project_vfm.vfm_1.weight",
        "encoder.project_vfm.vfm_1.bias",
    ]
    adapter = {n for n in trained if n.startswith("encoder.adapters.0.")}
    assert {"encoder.adapters.0.into.0.weight", "encoder.adapters.0.back.0.weight"} <= adapter
    assert "encoder.adapters.0.into.1.weight" not in adapter
    assert all(trained[n].grad is not None for n in adapter)
    assert three.segment(torch.rand(3, 70, 100)).shape == (1, 19, 70, 100)


def test_without_adapters_each_runs_as_if_alone(tiny: Registry) -> None:
    model = build_model("plain", tiny, vfm=[DINO, DEPTH])
    encoder, images = model.encoder, torch.rand(2, 3, *SIZE)
    assert encoder.schedule[0] == [range(0, 2), range(0, 1), range(0, 1)]
    with torch.no_grad():
        encoded = encoder(images)
        last, finished = {}, {}
        for role, b in encoder.backbones.items():
            stream = b.embed(b.normalize(images))
            tokens = stream.tokens
            for i in range(b.depth):
                tokens = b.block(i, tokens, stream.state)
            last[role], finished[role] = tokens, b.finish(tokens, stream.state)
        tap = [
            resample(last[r][:, b.num_prefix_tokens :], b.grid, (8, 12))
            for r, b in encoder.backbones.items()
        ]
        expected = torch.cat(tap, 2).transpose(1, 2).unflatten(2, (8, 12))
        torch.testing.assert_close(encoded.taps[-1], expected)
        # x_vlm + the sum of P_i(x_vfm_i), patches and class token.
        merged = finished["vlm"].clone()
        project = encoder.project_vfm["vfm_1"]  # type: ignore[index]
        for x, grid in ((project(finished["vfm_1"]), (4, 6)), (finished["vfm_2"], (8, 12))):
            maps = x[:, 1:].transpose(1, 2).unflatten(2, grid)
            maps = F.interpolate(maps, (4, 6), mode="bilinear", align_corners=False)
            merged += torch.cat([x[:, :1], maps.flatten(2).transpose(1, 2)], 1)
        vlm = encoder.vlm
        assert vlm is not None
        torch.testing.assert_close(encoded.visual, torch.cat(vlm.project(merged), 1))


def test_a_list_of_one_is_the_one(tiny: Registry) -> None:
    single, listed = tiny.pairing("tiny"), tiny.pairing("tiny", {"vfm": [DINO]})
    assert single == listed and single.model_dump(mode="json") == listed.model_dump(mode="json")
    one, other = build_model(single).state_dict(), build_model(listed).state_dict()
    assert list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


def test_mvfuser_reads_all_sequences_in_one_scan() -> None:
    """With every encoder at the scan's width it is MVFuser on all tokens, laid end to end."""
    from mfuser_plugins.fusion.mvfuser import MVFuserSpec, reading_order

    shapes = {"vfm_1": TokenShape(8, (2, 3), 1), "vfm_2": TokenShape(8, (1, 2), 0)}
    shapes["vlm"] = TokenShape(8, (2, 2), 1)
    tokens = [torch.randn(2, s.num_tokens, 8) for s in shapes.values()]
    grids = [s.grid for s in shapes.values()]
    lengths = [7, 2, 5]
    for order in ("vfm_first", "vlm_first", "interleaved"):
        spec = MVFuserSpec(state_size=2, order=order)  # type: ignore[arg-type]
        adapter = spec.build_many(shapes).eval()
        places = reading_order(lengths, spec.order, torch.device("cpu"))
        joint = adapter.mvfuser(torch.cat(tokens, 1)[:, places])
        expected = torch.empty_like(joint)
        expected[:, places] = joint
        for got, want in zip(adapter(tokens, grids), expected.split(lengths, 1), strict=True):
            torch.testing.assert_close(got, want)
    assert reading_order([2, 4, 1], "vlm_first", torch.device("cpu")).tolist() == [6, *range(6)]
    mixed = reading_order([2, 4, 1], "interleaved", torch.device("cpu")).tolist()
    assert mixed == [2, 0, 3, 6, 4, 1, 5]  # at 1/8, 1/4, 3/8, 1/2, 5/8, 3/4, 7/8
    with pytest.raises(MFuserError, match="the widths differ .vfm_1 8, vlm 6, scan 6"):
        MVFuserSpec(project=False).build_many(
            {"vfm_1": shapes["vfm_1"], "vlm": TokenShape(6, (2, 2), 0)}
        )


def test_a_checkpoint_of_several(tiny: Registry, three: DGSSModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    prints = checkpoints.frozen_fingerprint(three)
    assert list(prints) == ["vfm_1", "vfm_2", "vlm"] and len({str(p) for p in prints.values()}) == 3
    meta: dict[str, Any] = {
        **{"pairing": three.spec.model_dump(mode="json"), "run": {"seed": 0}, "step": 1},
        "frozen": prints,
    }
    checkpoints.write(path, Checkpoint(checkpoints.trained_state(three), {}, meta))
    loaded, _ = checkpoints.load_model(path, tiny)
    assert loaded.spec == three.spec
    images = torch.rand(3, *SIZE)
    assert torch.equal(loaded.segment(images), three.segment(images))
    with pytest.raises(MFuserError, match=r"frozen weights of its vfm_2 .*--set vfm\.2\.weights"):
        checkpoints.load_model(path, tiny, ["vfm.2.patch_resample=pinv"])


def test_settings_of_one_of_a_list(tiny: Registry) -> None:
    listed = {"vfm": [DINO, DEPTH]}
    spec = tiny.saved_pairing(
        tiny.pairing("tiny", listed).model_dump(mode="json"), ["vfm.2.freeze=false"], "here"
    )
    assert [s.freeze for s in spec.encoders().values()] == [True, False, True]
    table = tiny.pairing("plain", listed).model_dump(mode="json")
    for setting, said in (
        ("vfm.3.freeze=false", r"vfm\.3: 'vfm' is a list, whose items are vfm\.1 to vfm\.2"),
        ("vfm.freeze=false", r"vfm\.freeze: 'vfm' is a list, whose items are vfm\.1 to vfm\.2"),
        ("vfm.2.depht=1", r"here: vfm\.2\.depht: there is no such key; did you mean 'depth'"),
    ):
        with pytest.raises(MFuserError, match=said):
            tiny.saved_pairing(table, [setting], "here")


def test_tuning_and_rates_of_a_list(tiny: Registry) -> None:
    def tuned(*encoders: str) -> set[str]:
        tuning: dict[str, Any] = {"name": "lora", "rank": 2}
        if encoders:
            tuning["encoders"] = encoders
        model = build_model("plain", tiny, vfm=[DINO, DEPTH], tuning=tuning)
        return {n.split(".")[1] for n, _ in model.named_parameters() if n.endswith(".down")}

    assert tuned() == {"vfm_1", "vfm_2", "vlm"}
    assert tuned("vfm") == {"vfm_1", "vfm_2"} and tuned("vfm_2", "vlm") == {"vfm_2", "vlm"}
    with pytest.raises(MFuserError, match="change the 'vfm_3', and there is none .there is vfm_1,"):
        tuned("vfm_3")
    with pytest.raises(MFuserError, match=r"an encoder is 'vfm', 'vlm', or 'vfm_2' .* not 'vfn'"):
        tuned("vfn")
    model = build_model("plain", tiny, vfm=[DINO, {**DEPTH, "freeze": False}])
    groups = parameter_groups(model, RecipeSpec(steps=1, warmup=0, backbone_lr=0.1))
    names = {p: n for n, p in model.named_parameters()}
    slow = {names[p] for g in groups if g["factor"] == 0.1 for p in g["params"]}  # type: ignore[attr-defined]
    assert slow and all(n.startswith("encoder.vfm_2.") for n in slow)


def test_the_shipped_pairing_of_three(tmp_path: Path) -> None:
    """Vireo's kind at full size on the meta device; Depth Anything's file holds its encoder as
    `pretrained`, beside a head, in DINOv2's own names."""
    import timm

    encoder = sketch(load_registry().pairing("vireo-dinov2-l")).encoder
    assert list(encoder.backbones) == ["vfm_1", "vfm_2", "vlm"]
    assert encoder.tap_channels == 3 * 1024 and encoder.grid == (32, 32)
    assert [len(blocks) for blocks in encoder.schedule[0]] == [1, 1, 1]
    assert not any(p.requires_grad for b in encoder.backbones.values() for p in b.parameters())
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}
    donor = timm.create_model("vit_large_patch14_dinov2", num_classes=0, **options)
    own = {k: torch.randn_like(v) for k, v in donor.state_dict().items()}
    official = {k.replace("reg_token", "register_tokens"): v for k, v in own.items()}
    file = {f"pretrained.{k}": v for k, v in official.items()}
    file["pretrained.mask_token"] = torch.zeros(1, 32)
    file["depth_head.projects.0.weight"] = torch.randn(8, 32, 1, 1)
    torch.save(file, tmp_path / "depth_anything_v2_vitl.pth")
    spec = load_registry().component(
        "vision",
        {
            **{"name": "timm", "model": "vit_large_patch14_dinov2", "options": options},
            "weights": str(tmp_path / "depth_anything_v2_vitl.pth"),
        },
        "here",
    )
    loaded = spec.build((56, 56)).model.state_dict()  # type: ignore[attr-defined]
    assert loaded.keys() == own.keys() and all(torch.equal(loaded[k], own[k]) for k in own)


def test_what_describe_says(tiny: Registry) -> None:
    facts = describe(tiny.pairing("tiny", {"vfm": [DINO, DEPTH]}))
    assert [p["part"] for p in facts["parts"]][:4] == ["vfm_1", "vfm_2", "vlm", "fusion"]
    assert [p["component"] for p in facts["parts"]][:3] == ["timm", "transformers", "open_clip"]
    assert facts["encoders"]["vfm_2"]["grid"] == [8, 12]
    assert facts["projections"][0] == "final vfm_1 tokens: 32 to 48"
    assert (
        "final vfm_2 patches: 8x12 to 4x6, where they are added to the vlm's"
        in (facts["resampling"])
    )
    assert any("set vfm.2.freeze = false" in w for w in facts["warnings"])
    lines = [x for x in render("tiny", facts) if isinstance(x, str)]
    assert "blocks of a position: vfm_1 1 to 2, vfm_2 1, vlm 1" in lines


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"fusion": "cross_attention"},
            "fusion 'cross_attention' joins one VFM and one VLM, and 'vfm' is a list of 2; those "
            "that join any number: mvfuser, none",
        ),
        ({"vfm": []}, 'the list of VFMs is empty; write "none"'),
        ({"vfm": [DINO, "none"]}, "a list of VFMs names each of them"),
        ({"vfm": [DINO, {"name": "tim"}]}, "number 2 of the list: no vision or vision-language"),
        ({"vfm": [DINO, {**DINO, "modle": 1}]}, r"vfm\.2\.modle: there is no such key"),
        ({"taps": [0, 0, 1, 2]}, "go beyond the 2 positions of this pairing"),
        ({"merge": {"project": False}}, "the widths differ .vfm_1 32, vlm 48"),
    ],
)
def test_what_is_refused(tiny: Registry, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(MFuserError, match=said):
        build_model("plain", tiny, **{"vfm": [DINO, DEPTH], **changes})


def test_an_adapter_that_returns_too_few(tiny: Registry) -> None:
    class Short(ManyFusionAdapter):
        def forward(self, tokens: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
            return tokens[:1]

    model = build_model("plain", tiny, vfm=[DINO, DEPTH])
    model.encoder.adapters["0"] = Short()
    with pytest.raises(MFuserError, match="returned list, and a list of 3 offsets is expected"):
        model(torch.rand(1, 3, *SIZE))


def test_the_cost_of_joining_three(tiny: Registry) -> None:
    def cost(name: str, encoders: int) -> Any:
        spec = tiny.component("fusion", name, "here")
        assert isinstance(spec, FusionSpec)
        how: dict[str, Any] = {"width": 16, "grid": (2, 3), "batch": 1, "repeats": 1}
        return adapter_cost(spec, encoders=encoders, backward=False, **how)

    two, many = cost("mvfuser", 2), cost("mvfuser", 3)
    assert many.params == two.params and (two.tokens, many.tokens) == (14, 21)
    with pytest.raises(MFuserError, match="'convolution' joins two encoders, not 3"):
        cost("convolution", 3)
