"""The encoders in lockstep, two as a rule, and their outputs: taps and a visual embedding.

    image -> VFM tokens -> block 1 -> ... -> block N -> norm --+
                              ^ offset                          v
                            fusion adapter                    x_vlm + P(x_vfm) -> VLM head
                              v offset                          ^
    image -> VLM tokens -> block 1 -> ... -> block N -> norm --+

Of a list of VFMs each is stepped so, and each adds its own P_i(x_vfm_i).

Method: Zhang & Tan, "Mamba as a Bridge", CVPR 2025, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfuser.errors import PluginError
from mfuser.interfaces import (
    ManyFusionAdapter,
    Stream,
    TokenRefiner,
    VisionBackbone,
    VisionLanguageBackbone,
)
from mfuser.plugins.contracts import expect, named
from mfuser.specs import TokenShape


def lockstep(depths: Sequence[int]) -> list[list[range]]:
    """Pair the blocks of encoders by relative depth.

    One position per block of the shallowest encoder; position p ends, in every encoder, at the
    same fraction of its depth. Returns, per position, the blocks of each encoder to run:
    depths 12 and 24 give [[0:1, 0:2], [1:2, 2:4], ...].
    """
    positions = min(depths)
    ends = [[math.ceil((p + 1) * d / positions) for p in range(positions)] for d in depths]
    return [[range(e[p - 1] if p else 0, e[p]) for e in ends] for p in range(positions)]


def default_taps(positions: int) -> tuple[int, ...]:
    """A third, a half, two thirds and all of the depth: 7, 11, 15, 23 of 24, as released."""
    return tuple(max(1, round(positions * f)) - 1 for f in (1 / 3, 1 / 2, 2 / 3, 1))


def resample(patches: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(B, h*w, D) on one grid -> (B, h'*w', D) on another, bilinear."""
    if grid == to:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
    maps = F.interpolate(maps, to, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


@dataclass
class Encoded:
    """taps: four maps (B, sum of the widths, h, w). visual: tokens (B, 1 + T, C) in the joint
    space, global first, on `grid`; None without a VLM."""

    taps: list[Tensor]
    visual: Tensor | None
    grid: tuple[int, int]


@dataclass
class Way:
    """How far images have come. tokens, states: by encoder. fused: whether the adapters act.
    kept: taps by position."""

    tokens: dict[str, Tensor]
    states: dict[str, object]
    fused: bool = True
    kept: dict[int, Tensor] = field(default_factory=dict)


class PairEncoder(nn.Module):
    """Two backbones, or one, or a list of VFMs and perhaps a VLM, stepped together with fusion
    adapters between their blocks.

    vfm: of a list of several the backbones are `vfm_1`, `vfm_2`, …, and `vfm` is None.
    adapters: position -> adapter, which reads the token sequences after that position and
        returns an offset for each (paper, eq. 2-6); of a list, a ManyFusionAdapter.
    taps: four positions whose patch tokens feed the pyramid; none where there is no pyramid.
    project_vfm: maps the VFM's final tokens to the VLM's width before the two are added; of a
        list, the maps by role, where there are any.
    """

    def __init__(
        self,
        vfm: VisionBackbone | Sequence[VisionBackbone] | None,
        vlm: VisionLanguageBackbone | None,
        adapters: Mapping[int, nn.Module],
        taps: Sequence[int],
        project_vfm: nn.Module | None = None,
        vfm_norm: bool = True,
    ) -> None:
        super().__init__()
        several = list(vfm) if isinstance(vfm, Sequence) else []
        self.vfm = None if isinstance(vfm, Sequence) else vfm
        for i, backbone in enumerate(several, 1):
            self.add_module(f"vfm_{i}", backbone)
        self._vfms = tuple(f"vfm_{i + 1}" for i in range(len(several))) or ("vfm",)
        self.vlm = vlm
        self.schedule = lockstep([b.depth for b in self.backbones.values()])
        self.adapters = nn.ModuleDict({str(p): a for p, a in sorted(adapters.items())})
        self.taps = tuple(taps)
        self.project_vfm = project_vfm
        self.vfm_norm = vfm_norm
        self.grid = self._finest()
        self.checkpointing = False
        """Whether activations are computed again in the backward pass instead of being kept."""
        self.checkpointed: int | None = None
        """Those of so many of the last positions; None: of all."""
        self._linked: str | None = None

    def link(self, queries: int, width: int) -> bool:
        """Let the first encoder whose tuning has queries give them; whether there is one."""
        for role, backbone in self.backbones.items():
            refiner = getattr(backbone, "refiner", None)
            if isinstance(refiner, TokenRefiner) and refiner.link(queries, width):
                self._linked = role
                names = (f"refiner.{name}" for name, _ in refiner.named_parameters())
                backbone.tuned = backbone.tuned.union(names)
                return True
        return False

    def queries(self) -> Tensor | None:
        """The decoder's initial queries (Q, D) from a linked tuning; None without one."""
        return None if self._linked is None else self.backbones[self._linked].refiner.queries()

    @property
    def backbones(self) -> dict[str, VisionBackbone]:
        """The encoders that are there, VFMs first."""
        found = {role: getattr(self, role) for role in (*self._vfms, "vlm")}
        return {role: backbone for role, backbone in found.items() if backbone is not None}

    @property
    def vfms(self) -> dict[str, VisionBackbone]:
        """The VFMs among the encoders: one, several or none."""
        return {role: backbone for role, backbone in self.backbones.items() if role != "vlm"}

    def _finest(self) -> tuple[int, int]:
        return max((b.grid for b in self.backbones.values()), key=lambda g: g[0] * g[1])

    def resize(self, image_size: tuple[int, int]) -> None:
        """Set the backbones to images of another size, as each of them does it."""
        for backbone in self.backbones.values():
            backbone.resize(image_size)
        self.grid = self._finest()

    @property
    def tap_channels(self) -> int:
        return sum(b.embed_dim for b in self.backbones.values())

    def forward(self, images: Tensor) -> Encoded:
        """Images (B, 3, H, W), RGB in [0, 1], of the image size."""
        return self.end(self._run(images))

    def features(self, images: Tensor, fused: bool = True) -> dict[str, Tensor]:
        """Each encoder's patch tokens (B, h, w, D) after its last block and `finish`.

        fused: with the offsets of the adapters; else each encoder for itself.
        """
        way = self._run(images, fused)
        found = {}
        for role, backbone in self.backbones.items():
            finished = self._finish(backbone, way.tokens[role], way.states[role])
            found[role] = finished[:, backbone.num_prefix_tokens :].unflatten(1, backbone.grid)
        return found

    def visual_alone(self, images: Tensor) -> Tensor:
        """The embedding (B, 1 + T, C) of the VLM for itself: no offsets, nothing of the VFM."""
        assert self.vlm is not None
        way = self._run(images, fused=False)
        finished = self._finish(self.vlm, way.tokens["vlm"], way.states["vlm"])
        return self._project(self.vlm, finished, way.states["vlm"])

    def _run(self, images: Tensor, fused: bool = True) -> Way:
        """From the images to the last position."""
        way = self.begin(images, fused)
        for position in range(len(self.schedule)):
            self.advance(way, position)
        return way

    def begin(self, images: Tensor, fused: bool = True) -> Way:
        """The tokens before the first block. fused: whether the adapters will act."""
        streams = {r: self._embed(b, images) for r, b in self.backbones.items()}
        states = {r: s.state for r, s in streams.items()}
        return Way({r: s.tokens for r, s in streams.items()}, states, fused)

    def advance(self, way: Way, position: int, done: str | None = None) -> None:
        """Every encoder through its blocks of a position, then adapter and tap.

        done: an encoder that is through already.
        """
        tokens = way.tokens
        for role, indices in zip(self.backbones, self.schedule[position], strict=True):
            for i in indices if role != done else ():
                self.step(way, role, i)
        if way.fused and str(position) in self.adapters:
            offsets = self._fuse(self.adapters[str(position)], tokens, self.recomputes(position))
            for role, offset in offsets.items():
                tokens[role] = tokens[role] + offset
        if position in self.taps:
            way.kept[position] = self._tap(tokens)

    def step(self, way: Way, role: str, i: int) -> None:
        """One block of one encoder."""
        way.tokens[role] = self._step(
            self.backbones[role],
            i,
            way.tokens[role],
            way.states[role],
            self.recomputes(self.position(role, i)),
        )

    def position(self, role: str, i: int) -> int:
        """The position that a block of an encoder belongs to."""
        place = list(self.backbones).index(role)
        return next(p for p, blocks in enumerate(self.schedule) if i < blocks[place].stop)

    def recomputes(self, position: int) -> bool:
        """Whether what a position computes is computed again in the backward pass, not kept."""
        kept = 0 if self.checkpointed is None else len(self.schedule) - self.checkpointed
        return self.checkpointing and position >= kept and torch.is_grad_enabled()

    def end(self, way: Way) -> Encoded:
        """The outputs of the encoders after the last position."""
        visual, grid = None, self.grid
        if self.vlm is not None:
            merged = self._merge(way.tokens, way.states)
            visual = self._project(self.vlm, merged, way.states["vlm"])
            grid = self.vlm.grid
        return Encoded([way.kept[p] for p in self.taps], visual, grid)

    def _embed(self, backbone: VisionBackbone, images: Tensor) -> Stream:
        stream = backbone.embed(backbone.normalize(images))
        shape = (images.shape[0], backbone.token_shape.num_tokens, backbone.embed_dim)
        expect(backbone, "embed()'s token sequence", stream.tokens, shape)
        return stream

    def _project(self, vlm: VisionLanguageBackbone, tokens: Tensor, state: object) -> Tensor:
        """Global and dense embedding as one sequence (B, 1 + T, C)."""
        whole, dense = vlm.within(vlm.project, tokens, state)
        patches = vlm.grid[0] * vlm.grid[1]
        expect(vlm, "project()'s global embedding", whole, (tokens.shape[0], 1, vlm.text_dim))
        expect(vlm, "project()'s dense embedding", dense, (tokens.shape[0], patches, vlm.text_dim))
        return torch.cat([whole, dense], dim=1)

    def _fuse(
        self, adapter: nn.Module, tokens: dict[str, Tensor], recomputed: bool
    ) -> dict[str, Tensor]:
        grids = {role: backbone.grid for role, backbone in self.backbones.items()}
        given: tuple[object, ...]
        if isinstance(adapter, ManyFusionAdapter):
            roles, pair = tuple(tokens), f"a list of {len(tokens)} offsets"
            given = (list(tokens.values()), list(grids.values()))
        else:
            roles, pair = ("vfm", "vlm"), "a pair (vfm_offset, vlm_offset)"
            given = (*map(tokens.get, roles), *map(grids.get, roles))
        if recomputed:
            offsets = checkpoint(adapter, *given, use_reentrant=False)
        else:
            offsets = adapter(*given)
        if not isinstance(offsets, (tuple, list)) or len(offsets) != len(roles):
            raise PluginError(
                f"{named(adapter)}: forward() returned {type(offsets).__name__}, and {pair} is "
                "expected"
            )
        return {
            role: expect(adapter, f"the offset of the {role}", offset, tokens[role].shape)
            for role, offset in zip(roles, offsets, strict=True)
            if role in tokens and offset is not None
        }

    def _tap(self, tokens: dict[str, Tensor]) -> Tensor:
        """Patch tokens of all encoders on the finest grid, concatenated: (B, D, h, w)."""
        maps = [
            resample(tokens[r][:, b.num_prefix_tokens :], b.grid, self.grid)
            for r, b in self.backbones.items()
        ]
        tap: Tensor = torch.cat(maps, dim=2).transpose(1, 2).unflatten(2, self.grid)
        return tap

    def _step(
        self, backbone: VisionBackbone, i: int, tokens: Tensor, state: object, recomputed: bool
    ) -> Tensor:
        if recomputed and tokens.requires_grad:
            after = checkpoint(backbone.step, i, tokens, state, use_reentrant=False)
        else:
            after = backbone.step(i, tokens, state)
        return expect(backbone, f"block({i})'s result", after, tokens.shape)

    def _finish(self, backbone: VisionBackbone, tokens: Tensor, state: object) -> Tensor:
        finished = backbone.within(backbone.finish, tokens, state)
        return expect(backbone, "finish()'s result", finished, tokens.shape)

    def _merge(self, tokens: dict[str, Tensor], states: dict[str, object]) -> Tensor:
        """x_vlm + P(x_vfm): patches with patches, class token with class token if both have one."""
        assert self.vlm is not None
        merged = self._finish(self.vlm, tokens["vlm"], states["vlm"])
        for role, vfm in self.vfms.items():
            x_vfm = tokens[role]
            if self.vfm_norm:
                x_vfm = self._finish(vfm, x_vfm, states[role])
            if (project := self.projection(role)) is not None:
                x_vfm = project(x_vfm)
            n_vfm, n_vlm = vfm.num_prefix_tokens, self.vlm.num_prefix_tokens
            patches = resample(x_vfm[:, n_vfm:], vfm.grid, self.vlm.grid)
            shared = min(n_vfm, n_vlm, 1)
            added = F.pad(patches, (0, 0, n_vlm - shared, 0))
            merged = merged + torch.cat([x_vfm[:, :shared], added], dim=1)
        return merged

    def projection(self, role: str) -> nn.Module | None:
        """The map of a VFM's final tokens to the VLM's width, where there is one."""
        project = self.project_vfm
        if self.vfm is not None or not isinstance(project, nn.ModuleDict):
            return project
        return dict(project.items()).get(role)


def shapes(encoder_roles: Mapping[str, VisionBackbone]) -> tuple[TokenShape | None, ...]:
    """Token shapes of VFM and VLM, None where absent: the arguments of a fusion spec's build."""
    return tuple(
        encoder_roles[role].token_shape if role in encoder_roles else None
        for role in ("vfm", "vlm")
    )
