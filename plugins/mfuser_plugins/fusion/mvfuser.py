"""MVFuser, the fusion adapter of the paper (Zhang & Tan, CVPR 2025, section 4.1).

After a pair of blocks, one selective scan reads the tokens of both encoders, laid end to end:

    [dx_vfm ; dx_vlm] = MVFuser([x_vfm ; x_vlm])                                  (2)
    x_vfm + dx_vfm,  x_vlm + dx_vlm                                               (3)

    x_seq = SSM(conv(proj([x_vfm ; x_vlm])))        the sequential branch         (4)
    x_spa = conv(proj([x_vfm ; x_vlm]))             the spatial branch            (5)
    [dx_vfm ; dx_vlm] = proj(x_seq * x_spa)         gating                        (6)

The encoder adds the offsets (3); here are (2), in `MVFuserAdapter`, and (4) to (6), in `MVFuser`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import FusionSpec, MFuserError, TokenShape, hookimpl
from mfuser_plugins.fusion import _blocks as blocks
from mfuser_plugins.fusion._blocks import WHOLE, Ends, depthwise
from mfuser_plugins.fusion._joint import Grid, JointAdapter, width_of
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
        places = reading_order(lengths[0], lengths[1], self.order, joint.device)
        offsets = self.mvfuser(joint[:, places])[:, places.argsort()]
        return list(offsets.split(lengths, 1))


def reading_order(vfm: int, vlm: int, order: Order, device: torch.device) -> Tensor:
    """Indices into [VFM tokens ; VLM tokens], of those lengths, in the order of the scan."""
    first, second = (
        torch.arange(start, start + count, device=device) for start, count in ((0, vfm), (vfm, vlm))
    )
    if order == "interleaved":
        # By relative place, (i + 1/2) / N, in whole numbers; the VFM's first where they tie.
        keys = torch.cat([(2 * first + 1) * vlm, (2 * (second - vfm) + 1) * vfm])
        return keys.argsort(stable=True)
    return torch.cat([second, first] if order == "vlm_first" else [first, second])


class ScanFusionSpec(FusionSpec):
    """The options of adapters made of MVFusers (documented where they are named)."""

    single_tower: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, Any]] = {"state_size": 2}

    state_size: PositiveInt = 16
    dropout: float = Field(default=0.1, ge=0, lt=1)
    bidirectional: Bidirectional = False


class MVFuserSpec(ScanFusionSpec, name="mvfuser"):
    """MVFuser: a selective scan over the tokens of both encoders, laid end to end.

    state_size: N, states per channel of the scan.
    dropout: on the offsets.
    shared_width: width of the scan. None: the VLM's (the VFM's where there is no VLM).
    project: linear maps of the VFM's tokens to that width and back even at equal widths, as in
        the released CLIP models. None: only where the widths differ.
    bidirectional: a second scan reads from the end; true or "sum": the two outputs are added,
        "concat": laid side by side.
    order: how the two sequences are laid out: one after the other, or "interleaved" token by
        token (by relative place where their lengths differ). The scan reads one way: what comes
        later sees what came before. Released: "vfm_first".
    init: of the linear maps back from that width, where there are any. "near_zero": without bias,
        so that training starts from the encoders' own tokens; "released": as PyTorch makes them.
    """

    shared_width: PositiveInt | None = None
    project: bool | None = None
    order: Order = "vfm_first"
    init: Init = "near_zero"

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> MVFuserAdapter:
        return MVFuserAdapter(self, vfm, vlm)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [MVFuserSpec]
