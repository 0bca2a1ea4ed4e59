"""An MVFuser for each encoder, which then do not meet (paper, table 4)."""

from __future__ import annotations

from torch import Tensor

from mfuser import FusionAdapter, FusionSpec, MFuserError, TokenShape, hookimpl
from mfuser_plugins.fusion.mvfuser import MVFuser, ScanFusionSpec


class SeparateMVFuser(FusionAdapter):
    """One scan per encoder, at that encoder's own width: MVFuser without the exchange.

    Raises MFuserError if a width is odd.
    """

    def __init__(
        self,
        spec: SeparateMVFuserSpec,
        vfm: TokenShape | None,
        vlm: TokenShape | None,
    ) -> None:
        super().__init__()
        for role, shape in (("VFM", vfm), ("VLM", vlm)):
            if shape is not None and shape.embed_dim % 2:
                raise MFuserError(
                    f"separate_mvfuser: the {role}'s width of {shape.embed_dim} cannot be halved "
                    "for its two branches; use mvfuser with an even shared_width"
                )
        self.vfm = MVFuser(vfm.embed_dim, spec) if vfm else None
        self.vlm = MVFuser(vlm.embed_dim, spec) if vlm else None

    def forward(
        self,
        vfm_tokens: Tensor | None,
        vlm_tokens: Tensor | None,
        vfm_grid: tuple[int, int] | None = None,
        vlm_grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        vfm_offset = vlm_offset = None
        if vfm_tokens is not None:
            assert self.vfm is not None, "built for this encoder"
            vfm_offset = self.vfm(vfm_tokens)
        if vlm_tokens is not None:
            assert self.vlm is not None, "built for this encoder"
            vlm_offset = self.vlm(vlm_tokens)
        return vfm_offset, vlm_offset


class SeparateMVFuserSpec(ScanFusionSpec, name="separate_mvfuser"):
    """A selective scan over each encoder's own tokens (paper, table 4, "Sep. MVFuser").

    state_size: N, states per channel of the scans.
    dropout: on the offsets.
    bidirectional: as for mvfuser.
    """

    def build(self, vfm: TokenShape | None, vlm: TokenShape | None) -> SeparateMVFuser:
        return SeparateMVFuser(self, vfm, vlm)


@hookimpl
def mfuser_components() -> list[type[FusionSpec]]:
    return [SeparateMVFuserSpec]
