"""The selective scan and what it learns (Mamba's S6), in one direction or from the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Scan(nn.Module):
    """SSM of the paper's eq. 4, with the step bias counted twice (as released)."""

    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter

    def _add_scan(self, width: int, dt_rank: int, state_size: int) -> None:
        # Here for `mfuser list`, which imports every plugin: with torch's FLOP counter comes
        # triton. And no later: a counter knows the operators that existed when it was made.
        import mfuser_kernels  # noqa: F401

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
        """(B, L, D) -> (B, L, D), each token having read those before it; and the last state.

        state: (B, D, N), what has been read before the first token.
        """
        from mfuser_kernels import selective_scan

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
