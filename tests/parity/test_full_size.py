"""The three pairings that ship, laid out at full size: keys and parameter counts as released."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from golden import official_keys

from mfuser import DGSSModel, Registry, load_registry
from mfuser.model.assembly import unfilled
from mfuser.released import recognize, translate

PAIRINGS = {
    "eva": "dinov2-l_eva02-clip-l",
    "clip": "dinov2-l_clip-l",
    "siglip": "dinov2-l_siglip-l",
}

# Parameters of the released models, by part, without what is never used: EVA's random_text
# (14,592) and SigLIP's adapter projections (51,430,400), both trained, and DINOv2's mask token
# (1,024, frozen). Ours beside them: one logit_scale (with SigLIP a logit_bias too), frozen.
TRAINED = {
    "eva": {"fusion": 40_022_040, "pyramid": 50_341_888, "prompt": 6_144, "merge": 0,
            "enhancer": 1_494_401 + 768, "decoder": 26_766_292},
    "clip": {"fusion": 40_022_040 + 2 * 25_190_400, "pyramid": 50_341_888, "prompt": 3_840,
             "merge": 1_049_600, "enhancer": 1_494_401 + 768, "decoder": 26_766_292},
    "siglip": {"fusion": 40_022_040, "pyramid": 50_341_888, "prompt": 5_120, "merge": 0,
               "enhancer": 1_692_289 + 1_024, "decoder": 26_897_364},
}  # fmt: skip
FROZEN = {
    "eva": {"vfm": 304_293_888 - 1_024, "vlm": 733_065_152 - 304_293_888 + 1},
    "clip": {"vfm": 304_199_680 - 1_024, "vlm": 732_735_488 - 304_199_680 + 1},
    "siglip": {"vfm": 304_199_680 - 1_024, "vlm": 957_081_600 - 304_199_680 + 2},
}
TOTAL_TRAINED = {
    "eva": 118_646_125 - 14_592,
    "clip": 170_059_629,
    "siglip": 170_390_125 - 51_430_400,
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.fixture(scope="module", params=PAIRINGS)
def laid_out(request: pytest.FixtureRequest, registry: Registry) -> tuple[str, DGSSModel]:
    return request.param, unfilled(registry.pairing(PAIRINGS[request.param]))


def part_of(name: str) -> str:
    first, second = name.split(".")[:2]
    inner = {"adapters": "fusion", "project_vfm": "merge"}
    return inner.get(second, second) if first == "encoder" else first


def test_parameters_are_as_many_as_released(laid_out: tuple[str, DGSSModel]) -> None:
    kind, model = laid_out
    trained: Counter[str] = Counter(dict.fromkeys(TRAINED[kind], 0))
    frozen: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        (trained if parameter.requires_grad else frozen)[part_of(name)] += parameter.numel()
    assert trained == TRAINED[kind]
    assert trained.total() == TOTAL_TRAINED[kind]
    assert frozen == FROZEN[kind]


def test_every_released_key_is_accounted_for(laid_out: tuple[str, DGSSModel]) -> None:
    kind, model = laid_out
    official = official_keys(kind)
    shapes = official["state_dict"]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    form = recognize(state)
    assert form.name == kind
    result = translate(state, {n: t.shape for n, t in model.state_dict().items()}, form)
    mapped = [name for names in set(result.sources.values()) for name in names]
    assert sorted([*mapped, *result.unused]) == sorted(shapes)
    expected = {"backbone.dinov2.mask_token"} | {n for n in shapes if "rope" in n}
    expected |= {"random_text"} & shapes.keys()
    expected |= {n for n in shapes if kind == "siglip" and "adapter_proj" in n}
    assert result.unused.keys() == expected
    kept = {n.rpartition(".")[2] for n in result.kept}
    assert kept == ({"logit_scale", "logit_bias"} if kind == "siglip" else {"logit_scale"})
    trained = set(official["trainable_keys"])
    for name, parameter in model.named_parameters():
        for source in result.sources.get(name, ()):
            assert parameter.requires_grad == (source in trained), name
    if kind != "siglip":  # whose ids are not in the facts
        assert model.ids is not None and model.ids.tolist() == official["texts"]


def test_options_are_the_released_ones(laid_out: tuple[str, DGSSModel]) -> None:
    """The statements of docs/parity.md on tokens, positions, taps, statistics and windows."""
    kind, model = laid_out
    encoder = model.encoder
    assert encoder.vfm is not None and encoder.vlm is not None
    patches = {"eva": (36, 36)}.get(kind, (32, 32))
    assert encoder.vfm.grid == encoder.vlm.grid == patches
    assert encoder.vfm.num_prefix_tokens == 1
    assert encoder.vlm.num_prefix_tokens == (0 if kind == "siglip" else 1)
    assert encoder.taps == (7, 11, 15, 23)
    assert sorted(map(int, encoder.adapters)) == list(range(24))
    assert model.spec.image_size == (512, 512)
    clip = [0.48145466, 0.4578275, 0.40821073]
    assert encoder.vfm.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    wanted = [0.5, 0.5, 0.5] if kind == "siglip" else clip
    assert encoder.vlm.mean.flatten().tolist() == pytest.approx(wanted)
    length = model.spec.prompt.slots + model.spec.prompt.context
    assert encoder.vlm.text.positions == length == (13 if kind == "eva" else 10)  # type: ignore[attr-defined]
