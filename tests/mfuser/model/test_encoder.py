"""Two encoders in lockstep, against stepping each by hand and merging by loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small import clip
from torch import Tensor, nn

from mfuser import FusionAdapter, Registry, Stream, VisionBackbone, VisionLanguageBackbone
from mfuser import build_model as build
from mfuser.model.encoder import PairEncoder, default_taps, lockstep, resample
from mfuser.model.pyramid import Pyramid

depths = st.integers(1, 60)


@given(st.lists(depths, min_size=1, max_size=2))
def test_lockstep_runs_every_block_once_and_in_order(given_depths: list[int]) -> None:
    schedule = lockstep(given_depths)
    assert len(schedule) == min(given_depths)
    for e, depth in enumerate(given_depths):
        assert [i for position in schedule for i in position[e]] == list(range(depth))
        assert all(len(position[e]) >= 1 for position in schedule)


@given(depths, depths)
def test_positions_end_at_the_same_fraction_of_the_depth(one: int, other: int) -> None:
    for p, (a, b) in enumerate(lockstep([one, other])):
        fraction = (p + 1) / min(one, other)
        # The first block whose end is not before that fraction.
        assert (a.stop - 1) / one < fraction + 1e-9 and a.stop / one > fraction - 1e-9
        assert (b.stop - 1) / other < fraction + 1e-9 and b.stop / other > fraction - 1e-9


def test_lockstep_by_hand() -> None:
    assert lockstep([2, 4]) == [[range(0, 1), range(0, 2)], [range(1, 2), range(2, 4)]]
    assert lockstep([3, 2]) == [[range(0, 2), range(0, 1)], [range(2, 3), range(1, 2)]]
    assert lockstep([3]) == [[range(0, 1)], [range(1, 2)], [range(2, 3)]]


@given(st.integers(1, 100))
def test_default_taps_are_positions_in_order(positions: int) -> None:
    taps = default_taps(positions)
    assert len(taps) == 4 and list(taps) == sorted(taps)
    assert taps[0] >= 0 and taps[-1] == positions - 1


def test_default_taps_of_the_released_depths() -> None:
    assert default_taps(24) == (7, 11, 15, 23)
    assert default_taps(12) == (3, 5, 7, 11)


def test_resampling_is_bilinear_on_the_grid() -> None:
    patches = torch.randn(2, 6, 5)
    assert resample(patches, (2, 3), (2, 3)) is patches
    wide = resample(patches, (2, 3), (4, 6))
    maps = patches.reshape(2, 2, 3, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, (4, 6), mode="bilinear", align_corners=False)
    assert torch.equal(wide, expected.permute(0, 2, 3, 1).reshape(2, 24, 5))


class Toy(VisionLanguageBackbone):
    """Patch means, prefix tokens, linear blocks that mix the sequence, a norm, a projection."""

    def __init__(
        self, width: int, depth: int, prefix: int, patch: int, size: tuple[int, int], text: int
    ) -> None:
        super().__init__()
        self.embed_dim, self.depth, self.num_prefix_tokens = width, depth, prefix
        self.text_dim, self.context_dim = text, width
        self.patch_size, self.image_size = (patch, patch), size
        self.grid = (size[0] // patch, size[1] // patch)
        self.set_statistics((0.5, 0.4, 0.3), (0.2, 0.3, 0.1 * prefix + 0.1))
        self.lift = nn.Linear(3, width)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, text)
        self.calls: list[int] = []

    def resize(self, image_size: tuple[int, int], patch_size: int | None = None) -> None:
        raise NotImplementedError

    def embed(self, images: Tensor) -> Stream:
        patches = F.adaptive_avg_pool2d(images, self.grid).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix.expand(len(images), -1, -1), self.lift(patches)], 1)
        return Stream(tokens, self.grid, object())

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        self.calls.append(i)
        return tokens + torch.tanh(self.blocks[i](tokens + tokens.mean(1, keepdim=True)))

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.norm(tokens)

    def project(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        joint = self.head(tokens)
        return joint.mean(1, keepdim=True), joint[:, self.num_prefix_tokens :]


class Adding(FusionAdapter):
    """Adds to each encoder a number that tells the position."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.seen: list[Any] = []

    def forward(self, vfm_tokens, vlm_tokens, vfm_grid=None, vlm_grid=None):  # type: ignore[no-untyped-def]
        self.seen.append((vfm_grid, vlm_grid))
        return (
            None if vfm_tokens is None else torch.full_like(vfm_tokens, self.value),
            None if vlm_tokens is None else torch.full_like(vlm_tokens, -self.value),
        )


SIZE = (48, 64)


def pair(
    vfm: tuple[int, int, int, int] | None, vlm: tuple[int, int, int, int] | None, **kwargs: Any
) -> PairEncoder:
    """(width, depth, prefix, patch) of each."""
    torch.manual_seed(1)
    one = Toy(*vfm, SIZE, 7) if vfm else None
    two = Toy(*vlm, SIZE, 7) if vlm else None
    positions = min(b.depth for b in (one, two) if b is not None)
    project = None
    if one is not None and two is not None and one.embed_dim != two.embed_dim:
        project = nn.Linear(one.embed_dim, two.embed_dim)
    kwargs.setdefault("taps", default_taps(positions))
    adapters = kwargs.pop("adapters", {})
    return PairEncoder(one, two, adapters, project_vfm=project, **kwargs).eval()


def alone(backbone: VisionBackbone, images: Tensor) -> list[Tensor]:
    """The tokens after every block, none of them fused."""
    stream = backbone.embed((images - backbone.mean) / backbone.std)
    states, tokens = [], stream.tokens
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, stream.state)
        states.append(tokens)
    return states


PAIRS = [
    ((8, 3, 1, 16), (8, 3, 1, 16)),
    ((8, 6, 1, 16), (12, 2, 1, 16)),
    ((12, 2, 5, 8), (6, 5, 0, 16)),
    ((6, 4, 0, 16), (10, 4, 3, 8)),
    ((6, 1, 2, 16), (6, 7, 2, 16)),
    ((6, 4, 1, 8), None),
    (None, (6, 5, 1, 8)),
    (None, (6, 2, 0, 16)),
]


@pytest.mark.parametrize(("vfm", "vlm"), PAIRS)
def test_without_adapters_the_encoders_run_as_if_alone(vfm: Any, vlm: Any) -> None:
    encoder = pair(vfm, vlm)
    images = torch.rand(2, 3, *SIZE)
    encoded = encoder(images)
    expected_states = {}
    for role, backbone in encoder.backbones.items():
        assert backbone.calls == list(range(backbone.depth))  # type: ignore[attr-defined]
        expected_states[role] = alone(backbone, images)
    # Taps: patch tokens after the position's last block, on the finer grid, VFM first.
    h, w = encoder.grid
    for tap, position in zip(encoded.taps, encoder.taps, strict=True):
        parts = []
        for (role, backbone), blocks in zip(
            encoder.backbones.items(), encoder.schedule[position], strict=True
        ):
            tokens = expected_states[role][blocks.stop - 1][:, backbone.num_prefix_tokens :]
            gh, gw = backbone.grid
            maps = tokens.reshape(2, gh, gw, -1).permute(0, 3, 1, 2)
            if (gh, gw) != (h, w):
                maps = F.interpolate(maps, (h, w), mode="bilinear", align_corners=False)
            parts.append(maps)
        expected = torch.cat(parts, 1)
        assert tap.shape == (2, encoder.tap_channels, h, w)
        torch.testing.assert_close(tap, expected)
    if vlm is None:
        assert encoded.visual is None
        return
    torch.testing.assert_close(encoded.visual, naive_merge(encoder, expected_states))


def naive_merge(encoder: PairEncoder, states: dict[str, list[Tensor]]) -> Tensor:
    """x_vlm + P(x_vfm), token by token."""
    vlm, vfm = encoder.vlm, encoder.vfm
    assert isinstance(vlm, Toy)
    merged = vlm.finish(states["vlm"][-1], None).clone()
    if vfm is not None:
        x = vfm.finish(states["vfm"][-1], None)
        if encoder.project_vfm is not None:
            x = encoder.project_vfm(x)
        if vfm.num_prefix_tokens and vlm.num_prefix_tokens:
            merged[:, 0] += x[:, 0]  # class token with class token, registers with nothing
        maps = x[:, vfm.num_prefix_tokens :].reshape(len(x), *vfm.grid, -1).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, vlm.grid, mode="bilinear", align_corners=False)
        for row in range(vlm.grid[0]):
            for column in range(vlm.grid[1]):
                token = vlm.num_prefix_tokens + row * vlm.grid[1] + column
                merged[:, token] += maps[:, :, row, column]
    whole, dense = vlm.project(merged)
    return torch.cat([whole, dense], 1)


@pytest.mark.parametrize(("vfm", "vlm"), PAIRS)
def test_adapters_act_after_their_position_on_what_follows(vfm: Any, vlm: Any) -> None:
    adapters = {0: Adding(0.5)}
    encoder = pair(vfm, vlm, adapters=adapters)
    images = torch.rand(1, 3, *SIZE)
    encoded = encoder(images)
    assert adapters[0].seen == [
        (encoder.vfm and encoder.vfm.grid, encoder.vlm and encoder.vlm.grid)
    ]
    channel = 0
    for (role, backbone), blocks in zip(
        encoder.backbones.items(), encoder.schedule[0], strict=True
    ):
        stream = backbone.embed((images - backbone.mean) / backbone.std)
        tokens = stream.tokens
        for i in range(backbone.depth):
            tokens = backbone.block(i, tokens, None)
            if i == blocks.stop - 1:
                tokens = tokens + (0.5 if role == "vfm" else -0.5)
        last = tokens[:, backbone.num_prefix_tokens :]
        maps = resample(last, backbone.grid, encoder.grid).transpose(1, 2)
        got = encoded.taps[-1][:, channel : channel + backbone.embed_dim].flatten(2)
        torch.testing.assert_close(got, maps)
        channel += backbone.embed_dim


def test_the_final_norm_of_the_vfm_can_be_left_out() -> None:
    images = torch.rand(1, 3, *SIZE)
    with_norm, without = (
        pair((8, 2, 1, 16), (8, 2, 1, 16), vfm_norm=on)(images) for on in (True, False)
    )
    assert with_norm.visual is not None and without.visual is not None
    assert not torch.allclose(with_norm.visual, without.visual)
    assert torch.equal(with_norm.taps[-1], without.taps[-1])


def test_checkpointing_changes_no_value_and_no_gradient() -> None:
    images = torch.rand(1, 3, *SIZE)
    found = []
    for on in (False, True):
        encoder = pair((8, 3, 1, 16), (6, 2, 1, 8), adapters={0: Adding(0.1)})
        encoder.checkpointing = on
        encoded = encoder(images)
        encoded.visual.square().mean().backward()
        found.append((encoded.visual.detach(), encoder.vfm.lift.weight.grad.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


VLM = clip()


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_base_patch16_siglip_224", 0),
        ("eva02_tiny_patch14_224", 1),
        ("beitv2_base_patch16_224", 1),
        ("vit_small_patch16_dinov3", 5),
    ],
)
def test_real_families_beside_another(tiny: Registry, model: str, prefix: int) -> None:
    vfm = {
        "name": "timm",
        "model": model,
        "weights": "random",
        "options": {"embed_dim": 32, "depth": 3, "num_heads": 2},
    }
    built = build("tiny", tiny, vfm=vfm, image_size=[56, 70])
    vfm_backbone = built.encoder.vfm
    assert vfm_backbone is not None and vfm_backbone.num_prefix_tokens == prefix
    losses = built.train()(torch.rand(1, 3, 56, 70), torch.zeros(1, 56, 70, dtype=torch.long))
    assert all(v.isfinite() for v in losses.values())


def test_a_vision_language_model_serves_as_vfm(tiny: Registry) -> None:
    model = build("tiny", tiny, vfm=VLM, seed=3)
    vfm, vlm = model.encoder.vfm, model.encoder.vlm
    assert vfm is not None and vlm is not None and vfm is not vlm
    assert model.segment(torch.rand(3, 64, 96)).shape == (1, 19, 64, 96)


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 28, 32])
def test_the_pyramid_halves_from_level_to_level(patch: int) -> None:
    pyramid = Pyramid(6, 4, patch)
    grid = (224 // patch, 448 // patch)
    levels = pyramid([torch.randn(1, 6, *grid) for _ in range(4)])
    strides = [224 / level.shape[-2] for level in levels]
    assert all(level.shape[1] == 4 for level in levels)
    for stride, wanted in zip(strides, (4, 8, 16, 32), strict=True):
        assert wanted / math.sqrt(2) <= stride <= wanted * math.sqrt(2)
