"""MVFuser, the fusion adapter of the paper (section 4.1): one selective scan over both encoders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from mfuser import FusionAdapter, FusionSpec, MFuserError, TokenShape, hookimpl
from mfuser_kernels import selective_scan


class MVFuser(nn.Module):
    """Offsets for one joint token sequence (Zhang & Tan, CVPR 2025, eq. 2-6).

    A sequential branch (convolution, selective scan) gated by a spatial branch (convolution), at
    half the width. As in the released implementation, which the paper abridges: both convolutions
    are centred, the step bias counts twice (in `dt_proj` and again in the scan), the scan's
    output is normalised before the gate, and the gate passes SiLU twice. `scale` starts at 0.001,
    so that the offsets start near zero.

    Raises MFuserError if the width is odd: the two branches share it.
    """

    def __init__(self, width: int, state_size: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        if width % 2:
            raise MFuserError(
                f"mvfuser: a width of {width} cannot be halved for its two branches; set "
                f"shared_width to an even number, e.g. {width + 1}"
            )
        half = width // 2
        self.state_size = state_size
        self.dt_rank = math.ceil(width / 16)
        self.in_proj = nn.Linear(width, width, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, half)
        self.A_log = nn.Parameter(
            torch.arange(1, state_size + 1, dtype=torch.float32).log().repeat(half, 1)
        )
        self.D = nn.Parameter(torch.ones(half))
        self.norm = nn.RMSNorm(half, eps=1e-5)
        self.out_proj = nn.Linear(half, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self._reset_steps()

    def _reset_steps(self) -> None:
        """Step sizes log-uniform in [0.001, 0.1] (Mamba, arXiv 2312.00752, section 3.6)."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(1e-3), math.log(1e-1)
        steps = torch.exp(torch.rand(self.dt_proj.out_features) * (high - low) + low)
        with torch.no_grad():
            # The inverse of softplus.
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> offsets (B, L, D)."""
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, 1)  # (B, D/2, L) each
        x = F.silu(self.conv1d_x(x)).transpose(1, 2)  # (B, L, D/2)
        z = F.silu(self.conv1d_z(z)).transpose(1, 2)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.state_size, self.state_size], -1)
        y = selective_scan(
            x,
            self.dt_proj(dt),
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            layout="bld",
        )
        offsets = self.out_proj(self.norm(y) * F.silu(z))
        return self.dropout(offsets) * self.scale


class MVFuserAdapter(FusionAdapter):
    """One MVFuser on [VFM tokens ; VLM tokens], between linear maps where widths differ.

    `vfm_in` and `vfm_out` take the VFM's tokens to the width of the scan and its offsets back,
    `vlm_in` and `vlm_out` the VLM's; where none is needed they do nothing. With one encoder alone
    the scan reads that encoder's tokens.

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
    ) -> None:
        super().__init__()
        vfm_width = vfm.embed_dim if vfm else None
        vlm_width = vlm.embed_dim if vlm else None
        width = shared_width or vlm_width or vfm_width
        assert width is not None, "a pairing has an encoder"
        if project is False and {vfm_width, vlm_width} - {None, width}:
            raise MFuserError(
                f"mvfuser: project = false, but the widths differ (VFM {vfm_width}, VLM "
                f"{vlm_width}, scan {width}); leave project out, and maps are added where needed"
            )
        # The released CLIP models map the VFM's tokens even at equal widths, the VLM's never.
        self.vfm_in, self.vfm_out = _maps(vfm_width, width, always=bool(project))
        self.vlm_in, self.vlm_out = _maps(vlm_width, width, always=False)
        self.mvfuser = MVFuser(width, state_size, dropout)

    def forward(
        self,
        vfm_tokens: Tensor | None,
        vlm_tokens: Tensor | None,
        vfm_grid: tuple[int, int] | None = None,
        vlm_grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        if vfm_tokens is None:
            assert vlm_tokens is not None, "a pairing has an encoder"
            return None, self.vlm_out(self.mvfuser(self.vlm_in(vlm_tokens)))
        if vlm_tokens is None:
            return self.vfm_out(self.mvfuser(self.vfm_in(vfm_tokens))), None
        joint = torch.cat([self.vfm_in(vfm_tokens), self.vlm_in(vlm_tokens)], 1)
        lengths = [vfm_tokens.shape[1], vlm_tokens.shape[1]]
        vfm_offset, vlm_offset = self.mvfuser(joint).split(lengths, 1)
        return self.vfm_out(vfm_offset), self.vlm_out(vlm_offset)


def _maps(tokens: int | None, width: int, always: bool) -> tuple[nn.Module, nn.Module]:
    """Linear maps from an encoder's width to the scan's and back, or nothing."""
    if tokens is None or (tokens == width and not always):
        return nn.Identity(), nn.Identity()
    back = nn.Linear(width, tokens)
    # Else the offsets would start at this bias (up to 0.03 at width 1024), not near zero.
    nn.init.zeros_(back.bias)
    return nn.Linear(tokens, width), back


class MVFuserSpec(FusionSpec, name="mvfuser"):
    """MVFuser: a selective scan over the tokens of both encoders, laid end to end.

    state_size: N, states per channel of the scan.
    dropout: on the offsets.
    shared_width: width of the scan. None: the VLM's (the VFM's where there is no VLM).
    project: linear maps of the VFM's tokens to that width and back even at equal widths, as in
        the released CLIP models. None: only where the widths differ.
    """

    single_tower: ClassVar[bool] = True
    tiny: ClassVar[Mapping[str, Any]] = {"state_size": 2}

    state_size: PositiveInt = 16
    dropout: float = Field(default=0.1, ge=0, lt=1)
    shared_width: PositiveInt | None = None
    project: bool | None = None

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> MVFuserAdapter:
        return MVFuserAdapter(
            vfm, vlm, self.state_size, self.dropout, self.shared_width, self.project
        )


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [MVFuserSpec]
