"""Low-rank factors of a weight: where updates by SoMA and RecycleLoRA start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Factors:
    """up: (out, rank). down: (groups * rank, in)."""

    up: Tensor
    down: Tensor


def trained_like(weight: Tensor, *shape: int) -> nn.Parameter:
    """An empty parameter where the weight is, in float32 at least: half precisions lose the steps
    of an optimizer."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))


def minor_singular(weight: Tensor, rank: int, scale: float, groups: int = 1) -> Factors:
    """The smallest singular components U S V' of a weight (out, in), or of each equal share of
    its rows: scale * up @ down are they, each factor with half of S (SoMA, arXiv 2412.04077)."""

    from scipy import linalg

    def factorize(share: Tensor) -> tuple[Tensor, Tensor]:
        # By the few smallest eigenvalues of the Gram matrix of the shorter side: a third of the
        # time of a whole decomposition, and in double precision exact enough for single.
        exact = share.double()
        tall = share.shape[0] >= share.shape[1]
        gram = exact.T @ exact if tall else exact @ exact.T
        _, vectors = linalg.eigh(gram.cpu().numpy(), subset_by_index=(0, rank - 1))
        basis = torch.from_numpy(vectors).to(exact)  # (shorter side, rank)
        scaled = exact @ basis if tall else basis.T @ exact  # U S, or S V'
        half = (scaled.norm(dim=0 if tall else 1) / scale).sqrt().clamp_min(1e-30)
        if tall:
            return scaled / (scale * half), half[:, None] * basis.T
        return basis * half, scaled / (scale * half[:, None])

    return _each(weight, groups, rank, factorize)


def pivoted(weight: Tensor, rank: int, major_rank: int, groups: int = 1) -> tuple[Factors, Factors]:
    """Minor and major directions by QR with column pivoting, W P = Q R: the last `rank` and the
    first `major_rank` columns of Q, each for the one input that its pivot names (RecycleLoRA,
    arXiv 2603.28142)."""
    from scipy import linalg

    def decompose(share: Tensor) -> tuple[Tensor, Tensor]:
        q, _, pivots = linalg.qr(share.cpu().numpy(), pivoting=True, mode="economic")
        chosen = torch.from_numpy(pivots[: q.shape[1]]).long()
        inputs = torch.nn.functional.one_hot(chosen, share.shape[1])
        return torch.from_numpy(q), inputs

    found: list[tuple[Tensor, Tensor]] = []

    def last(share: Tensor) -> tuple[Tensor, Tensor]:
        found.append(decompose(share))
        q, inputs = found[-1]
        return q[:, -rank:], inputs[-rank:]

    minor = _each(weight, groups, rank, last)
    shares = iter(found)

    def first(_: Tensor) -> tuple[Tensor, Tensor]:
        q, inputs = next(shares)
        return q[:, :major_rank], inputs[:major_rank]

    return minor, _each(weight, groups, major_rank, first)


def _each(
    weight: Tensor, groups: int, rank: int, factorize: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Factors:
    """`factorize` of each share of the rows, in float32; shapes alone on the meta device."""
    rows, columns = weight.shape
    if weight.is_meta:
        return Factors(weight.new_empty(rows, rank), weight.new_empty(groups * rank, columns))
    shares = [factorize(share) for share in weight.detach().float().chunk(groups)]
    ups, downs = zip(*shares, strict=True)
    return Factors(torch.cat(ups).float(), torch.cat(downs).float())
