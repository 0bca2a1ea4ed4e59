"""MVFuser, the fusion adapter of the paper (section 4.1): one selective scan over both encoders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import FusionSpec, MFuserError, TokenShape, hookimpl
from mfuser_kernels import selective_scan
from mfuser_plugins.fusion._joint import Grid, JointAdapter, width_of

Bidirectional = bool | Literal["sum", "concat"]
Order = Literal["vfm_first", "vlm_first", "interleaved"]
Init = Literal["near_zero", "released"]
# Tokens that inference on a CPU works on at a time: what is computed of them stays in the caches.
# In whole chunks of the scan, so that its result is the same to the last bit.
BLOCK, CHUNK = 3072, 64


class Scan(nn.Module):
    """The selective scan and what it learns, with the step bias counted twice (as released)."""

    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter

    def _add_scan(self, width: int, dt_rank: int, state_size: int) -> None:
        self.x_proj = nn.Linear(width, dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(dt_rank, width)
        self.A_log = nn.Parameter(
            torch.arange(1, state_size + 1, dtype=torch.float32).log().repeat(width, 1)
        )
        self.D = nn.Parameter(torch.ones(width))

    def _reset_steps(self) -> None:
        """Step sizes log-uniform in [0.001, 0.1] (Mamba, arXiv 2312.00752, section 3.6)."""
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(1e-3), math.log(1e-1)
        steps = torch.exp(torch.rand(self.dt_proj.out_features) * (high - low) + low)
        with torch.no_grad():
            # The inverse of softplus.
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def scan(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, L, D/2) -> (B, L, D/2), each token having read those before it; and the last state.

        state: (B, D/2, N), what has been read before the first token.
        """
        dt_rank, state_size = self.dt_proj.in_features, self.A_log.shape[1]
        dt, B, C = self.x_proj(x).split([dt_rank, state_size, state_size], -1)
        y, last = selective_scan(
            x,
            self.dt_proj(dt),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            return_last_state=True,
            layout="bld",
            initial_state=state,
        )
        return y, last


class ReverseScan(Scan):
    """A scan from the last token to the first, with weights of its own."""

    def __init__(self, width: int, dt_rank: int, state_size: int) -> None:
        super().__init__()
        self._add_scan(width, dt_rank, state_size)
        self._reset_steps()

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(x.flip(1))[0].flip(1)


class MVFuser(Scan):
    """Offsets for one joint token sequence (Zhang & Tan, CVPR 2025, eq. 2-6).

    A sequential branch (convolution, selective scan) gated by a spatial branch (convolution), at
    half the width. As in the released implementation, which the paper abridges: both convolutions
    are centered, the step bias counts twice (in `dt_proj` and again in the scan), the scan's
    output is normalized before the gate, and the gate passes SiLU twice. `scale` starts at 0.001,
    so that the offsets start near zero.

    bidirectional: a second scan reads the sequence from its end (Vision Mamba, arXiv 2401.09417),
    with weights of its own behind the same convolution. "sum", or True, adds the two outputs;
    "concat" lays them side by side before the norm, which doubles `out_proj`.

    Raises MFuserError if the width is odd: the two branches share it.
    """

    def __init__(
        self,
        width: int,
        state_size: int = 16,
        dropout: float = 0.1,
        bidirectional: Bidirectional = False,
    ) -> None:
        super().__init__()
        if width % 2:
            raise MFuserError(
                f"mvfuser: a width of {width} cannot be halved for its two branches; set "
                f"shared_width to an even number, e.g. {width + 1}"
            )
        half = width // 2
        dt_rank = math.ceil(width / 16)
        self.concat = bidirectional == "concat"
        out = width if self.concat else half
        self.in_proj = nn.Linear(width, width, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self._add_scan(half, dt_rank, state_size)
        self.norm = nn.RMSNorm(out, eps=1e-5)
        self.out_proj = nn.Linear(out, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self._reset_steps()
        self.reverse = ReverseScan(half, dt_rank, state_size) if bidirectional else None

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> offsets (B, L, D)."""
        batch, length, _ = tokens.shape
        # A GPU wants the whole length at once, training keeps everything anyway.
        whole = tokens.device.type != "cpu" or torch.is_grad_enabled() or self.reverse is not None
        if torch.compiler.is_compiling() or whole or batch * length <= BLOCK:
            return self._offsets(tokens, 0, length)[0]
        count = -(-batch * length // BLOCK)
        size = -(-length // (count * CHUNK)) * CHUNK  # even shares
        out, state = torch.empty_like(tokens), None
        for start in range(0, length, size):
            stop = min(start + size, length)
            out[:, start:stop], state = self._offsets(tokens, start, stop, state)
        return out

    def _offsets(
        self, tokens: Tensor, start: int, stop: int, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Offsets of tokens start to stop, and the scan's last state."""
        left, right = max(start - 1, 0), min(stop + 1, tokens.shape[1])  # seen by the convolutions
        outside = (left == start, right == stop)
        seen = tokens[:, left:right].contiguous()
        x, z = (F.linear(seen, w) for w in self.in_proj.weight.chunk(2))  # (B, L, D/2) each
        x = F.silu(_depthwise(x, self.conv1d_x, outside))
        z = F.silu(_depthwise(z, self.conv1d_z, outside))
        (y, last), gate = self.scan(x, state), F.silu(z)
        if self.reverse is not None and self.concat:
            y, gate = torch.cat([y, self.reverse(x)], -1), gate.repeat(1, 1, 2)  # (B, L, D)
        elif self.reverse is not None:
            y = y + self.reverse(x)
        # Under autocast y is of lower precision than the weight; PyTorch warns of such a mixture.
        y = F.rms_norm(y, y.shape[-1:], self.norm.weight.to(y.dtype), self.norm.eps)
        return self.dropout(self.out_proj(y * gate)) * self.scale, last


def _depthwise(x: Tensor, conv: nn.Conv1d, outside: tuple[bool, bool]) -> Tensor:
    """(B, L, D) -> (B, L, D): `conv` along L; where not beside the `outside`, L is 1 shorter.

    As a picture of height 1 in "channels last", which (B, L, D) already is in memory: conv1d would
    copy it to (B, D, L), and the scan back, together half of what the projections cost.
    """
    before, after = outside
    if before != after:
        x = F.pad(x, (0, 0, int(before), int(after)))
    picture = x.transpose(1, 2).unsqueeze(2)  # (B, D, 1, L)
    weight = conv.weight.unsqueeze(2)  # (D, 1, 1, 3)
    padding = (0, int(before and after))
    return F.conv2d(picture, weight, padding=padding, groups=conv.groups).squeeze(2).transpose(1, 2)


class MVFuserAdapter(JointAdapter):
    """One MVFuser on [VFM tokens ; VLM tokens], between linear maps where widths differ.

    With one encoder alone the scan reads that encoder's tokens.

    Raises MFuserError if widths differ and project=False.
    """

    def __init__(
        self,
        vfm: TokenShape | None,
        vlm: TokenShape | None,
        state_size: int = 16,
        dropout: float = 0.1,
        shared_width: int | None = None,
        project: bool | None = None,
        bidirectional: Bidirectional = False,
        order: Order = "vfm_first",
        init: Init = "near_zero",
    ) -> None:
        width = width_of(vfm, vlm, shared_width)
        vfm_width = vfm.embed_dim if vfm else None
        vlm_width = vlm.embed_dim if vlm else None
        if project is False and {vfm_width, vlm_width} - {None, width}:
            raise MFuserError(
                f"mvfuser: project = false, but the widths differ (VFM {vfm_width}, VLM "
                f"{vlm_width}, scan {width}); leave project out, and maps are added where needed"
            )
        # The released CLIP models map the VFM's tokens even at equal widths, the VLM's never.
        super().__init__(vfm, vlm, width, map_vfm=bool(project), near_zero=init == "near_zero")
        self.order: Order = order
        self.mvfuser = MVFuser(width, state_size, dropout, bidirectional)

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


class MVFuserSpec(FusionSpec, name="mvfuser"):
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

    single_tower: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, Any]] = {"state_size": 2}

    state_size: PositiveInt = 16
    dropout: float = Field(default=0.1, ge=0, lt=1)
    shared_width: PositiveInt | None = None
    project: bool | None = None
    bidirectional: Bidirectional = False
    order: Order = "vfm_first"
    init: Init = "near_zero"

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> MVFuserAdapter:
        return MVFuserAdapter(
            vfm,
            vlm,
            self.state_size,
            self.dropout,
            self.shared_width,
            self.project,
            self.bidirectional,
            self.order,
            self.init,
        )


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [MVFuserSpec]
