"""MVFuser, the fusion adapter of the paper (Zhang & Tan, CVPR 2025, section 4.1).

After a pair of blocks, one selective scan reads the tokens of both encoders, laid end to end:

    [dx_vfm ; dx_vlm] = MVFuser([x_vfm ; x_vlm])                                  (2)
    x_vfm + dx_vfm,  x_vlm + dx_vlm                                               (3)

    x_seq = SSM(conv(proj([x_vfm ; x_vlm])))        the sequential branch         (4)
    x_spa = conv(proj([x_vfm ; x_vlm]))             the spatial branch            (5)
    [dx_vfm ; dx_vlm] = proj(x_seq * x_spa)         gating                        (6)

The encoder adds the offsets (3); here are (2), in `MVFuserAdapter`, and (4) to (6), in `MVFuser`.
Of a list of VFMs all sequences are laid end to end (`ManyMVFuser`), which the paper does not try.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import FusionSpec, ManyFusionAdapter, MFuserError, TokenShape, hookimpl
from mfuser_plugins.fusion import _blocks as blocks
from mfuser_plugins.fusion._blocks import WHOLE, Ends, depthwise
from mfuser_plugins.fusion._joint import Grid, JointAdapter, maps, width_of
from mfuser_plugins.fusion._scan import ReverseScan, Scan

Bidirectional = bool | Literal["sum", "concat"]
Order = Literal["vfm_first", "vlm_first", "interleaved"]
Init = Literal["near_zero", "released"]


class MVFuser(Scan):
    """Offsets for one joint token sequence: eq. 4 to 6, at half the width D.

    As in the released implementation, which the paper abridges: both convolutions are centered
    and followed by SiLU, the step bias counts twice (in `dt_proj` and again in the scan), the
    scan's output is normalized before the gate, and the gate passes SiLU once more. `scale` starts
    at 0.001, so that the offsets start near zero.

    spec.bidirectional: a second scan reads the sequence from its end (Vision Mamba, arXiv
    2401.09417), with weights of its own behind the same convolution. "sum", or True, adds the two
    outputs; "concat" lays them side by side before the norm, which doubles `out_proj`.

    Raises MFuserError if the width is odd: the two branches share it.
    """

    def __init__(self, width: int, spec: ScanFusionSpec) -> None:
        super().__init__()
        if width % 2:
            raise MFuserError(
                f"mvfuser: a width of {width} cannot be halved for its two branches; set "
                f"shared_width to an even number, e.g. {width + 1}"
            )
        half, dt_rank = width // 2, math.ceil(width / 16)
        self.concat = spec.bidirectional == "concat"
        out = width if self.concat else half
        self.in_proj = nn.Linear(width, width, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self._add_scan(half, dt_rank, spec.state_size)
        self.norm = nn.RMSNorm(out, eps=1e-5)
        self.out_proj = nn.Linear(out, width, bias=False)
        self.dropout = nn.Dropout(spec.dropout)
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self._reset_steps()
        self.reverse = ReverseScan(half, dt_rank, spec.state_size) if spec.bidirectional else None

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> offsets (B, L, D)."""
        if self.reverse is None and blocks.pay(tokens):
            return blocks.in_blocks(self.offsets, tokens)
        return self.offsets(tokens)[0]

    def offsets(
        self, tokens: Tensor, ends: Ends = WHOLE, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> offsets (B, L, D), and the scan's last state (B, D/2, N).

        ends, state: where `tokens` are a piece of a sequence, and what was read before it.
        """
        x, z = (F.linear(tokens, half) for half in self.in_proj.weight.chunk(2))  # (B, L, D/2)
        x = F.silu(depthwise(x, self.conv1d_x, ends))
        x_seq, last = self.scan(x, state)  # eq. 4
        x_spa = F.silu(depthwise(z, self.conv1d_z, ends))  # eq. 5
        gate = F.silu(x_spa)
        if self.reverse is not None and self.concat:
            x_seq, gate = torch.cat([x_seq, self.reverse(x)], -1), gate.repeat(1, 1, 2)
        elif self.reverse is not None:
            x_seq = x_seq + self.reverse(x)
        offsets = self.out_proj(self._normalized(x_seq) * gate)  # eq. 6
        return self.dropout(offsets) * self.scale, last

    def _normalized(self, x: Tensor) -> Tensor:
        # Under autocast x is of lower precision than the weight; PyTorch warns of such a mixture.
        return F.rms_norm(x, x.shape[-1:], self.norm.weight.to(x.dtype), self.norm.eps)


class MVFuserAdapter(JointAdapter):
    """One MVFuser on [VFM tokens ; VLM tokens] (eq. 2), between linear maps where widths differ.

    With one encoder alone the scan reads that encoder's tokens.

    Raises MFuserError if widths differ and spec.project is False.
    """

    def __init__(self, spec: MVFuserSpec, vfm: TokenShape | None, vlm: TokenShape | None) -> None:
        width = width_of(vfm, vlm, spec.shared_width)
        vfm_width = vfm.embed_dim if vfm else None
        vlm_width = vlm.embed_dim if vlm else None
        if spec.project is False and {vfm_width, vlm_width} - {None, width}:
            raise MFuserError(
                f"mvfuser: project = false, but the widths differ (VFM {vfm_width}, VLM "
                f"{vlm_width}, scan {width}); leave project out, and maps are added where needed"
            )
        # The released CLIP models map the VFM's tokens even at equal widths, the VLM's never.
        near_zero = spec.init == "near_zero"
        super().__init__(vfm, vlm, width, map_vfm=bool(spec.project), near_zero=near_zero)
        self.order: Order = spec.order
        self.mvfuser = MVFuser(width, spec)

    def mix(self, streams: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        lengths = [tokens.shape[1] for tokens in streams]
        joint = torch.cat(streams, 1)
        if len(streams) == 1 or self.order == "vfm_first":
            return list(self.mvfuser(joint).split(lengths, 1))
        places = reading_order(lengths, self.order, joint.device)
        offsets = self.mvfuser(joint[:, places])[:, places.argsort()]
        return list(offsets.split(lengths, 1))


class ManyMVFuser(ManyFusionAdapter):
    """One MVFuser on the tokens of any number of encoders, laid end to end: eq. 2 with more terms.

    Each encoder's tokens are mapped to the scan's width and its offsets back, where its width is
    another; spec.project maps those of the VFMs at equal widths too.

    Raises MFuserError if widths differ and spec.project is False.
    """

    def __init__(self, spec: MVFuserSpec, shapes: Mapping[str, TokenShape]) -> None:
        super().__init__()
        widths = {role: shape.embed_dim for role, shape in shapes.items()}
        width = spec.shared_width or widths.get("vlm") or next(iter(widths.values()))
        if spec.project is False and set(widths.values()) - {width}:
            raise MFuserError(
                f"mvfuser: project = false, but the widths differ ({listed(widths)}, scan "
                f"{width}); leave project out, and maps are added where needed"
            )
        near_zero = spec.init == "near_zero"
        made = [
            maps(own, width, bool(spec.project) and role != "vlm", near_zero)
            for role, own in widths.items()
        ]
        self.into = nn.ModuleList(into for into, _ in made)
        self.back = nn.ModuleList(back for _, back in made)
        self.order: Order = spec.order
        self.has_vlm = "vlm" in shapes
        self.mvfuser = MVFuser(width, spec)

    def forward(self, tokens: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        joint = torch.cat([into(x) for into, x in zip(self.into, tokens, strict=True)], 1)
        lengths = [x.shape[1] for x in tokens]
        # Without a VLM there is none that could come first.
        order = self.order if self.has_vlm or self.order == "interleaved" else "vfm_first"
        places = reading_order(lengths, order, joint.device)
        offsets = self.mvfuser(joint[:, places])[:, places.argsort()].split(lengths, 1)
        return [back(x) for back, x in zip(self.back, offsets, strict=True)]


def listed(widths: Mapping[str, int]) -> str:
    """ "vfm_1 1024, vlm 768"."""
    return ", ".join(f"{role} {width}" for role, width in widths.items())


def reading_order(lengths: Sequence[int], order: Order, device: torch.device) -> Tensor:
    """Indices into the sequences of those lengths, laid end to end, in the order of the scan.

    "vlm_first": the last one before the others.
    """
    if order == "interleaved":
        # By relative place, (i + 1/2) / N, in whole numbers; where they tie, the first one first.
        whole = math.prod(lengths)
        keys = [(2 * torch.arange(n, device=device) + 1) * (whole // n) for n in lengths]
        return torch.cat(keys).argsort(stable=True)
    places = torch.arange(sum(lengths), device=device)
    return places.roll(lengths[-1]) if order == "vlm_first" else places


class ScanFusionSpec(FusionSpec):
    """The options of adapters made of MVFusers (documented where they are named)."""

    single_tower: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, Any]] = {"state_size": 2}

    state_size: PositiveInt = 16
    dropout: float = Field(default=0.1, ge=0, lt=1)
    bidirectional: Bidirectional = False


class MVFuserSpec(ScanFusionSpec, name="mvfuser"):
    """MVFuser: a selective scan over the tokens of all encoders, laid end to end.

    state_size: N, states per channel of the scan.
    dropout: on the offsets.
    shared_width: width of the scan. None: the VLM's (where there is none the first VFM's).
    project: linear maps of the VFM's tokens to that width and back even at equal widths, as in
        the released CLIP models. None: only where the widths differ.
    bidirectional: a second scan reads from the end; true or "sum": the two outputs are added,
        "concat": laid side by side.
    order: how the sequences are laid out: one after the other, or "interleaved" token by token
        (by relative place where their lengths differ). The scan reads one way: what comes later
        sees what came before. Released: "vfm_first".
    init: of the linear maps back from that width, where there are any. "near_zero": without bias,
        so that training starts from the encoders' own tokens; "released": as PyTorch makes them.
    """

    any_number: ClassVar[bool] = True

    shared_width: PositiveInt | None = None
    project: bool | None = None
    order: Order = "vfm_first"
    init: Init = "near_zero"

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> MVFuserAdapter:
        return MVFuserAdapter(self, vfm, vlm)

    def build_many(self, shapes: Mapping[str, TokenShape]) -> ManyMVFuser:
        return ManyMVFuser(self, shapes)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [MVFuserSpec]
