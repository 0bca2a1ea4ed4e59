"""The last blocks of an encoder in the hands of a decoder whose tokens join them.

    patches, class token, … -> block -> … -> [own tokens ; the decoder's] -> block -> … -> norm

The encoder is run up to there in lockstep with the others, and each step of the decoder takes it
one block further; at the end of a position the others follow and the fusion adapter acts, on the
encoders' own tokens alone. Decoders of this kind: EoMT (Kerssies et al., CVPR 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mfuser.errors import MFuserError, PluginError
from mfuser.interfaces import LastBlocks, VisionBackbone
from mfuser.model.encoder import Encoded, PairEncoder
from mfuser.plugins.contracts import expect, named
from mfuser.specs import DecoderSpec


class CannotJoinError(MFuserError):
    """An encoder whose blocks take no further tokens, or that has too few."""


def check_joins(decoder: DecoderSpec, role: str, backbone: VisionBackbone) -> None:
    """Raises CannotJoinError, with the reason, where a decoder's tokens cannot join its blocks."""
    count = decoder.joins()
    joins = f"decoder '{decoder.name}' joins the last {count} blocks of the {role}"
    reason = backbone.no_extra()
    if reason is not None:
        raise CannotJoinError(
            f"{joins}, and {named(backbone)} takes no further tokens there: {reason}; plain vision "
            "transformers do (DINOv2, DINOv3, EVA02, CLIP, SigLIP)"
        )
    if count > backbone.depth:
        raise CannotJoinError(f"{joins}, which has {backbone.depth}")


class JoinedBlocks(LastBlocks):
    """The last blocks of the encoder's first backbone, for one batch of images."""

    def __init__(self, encoder: PairEncoder, images: Tensor, count: int) -> None:
        self.encoder = encoder
        self.role, self.backbone = next(iter(encoder.backbones.items()))
        self.count, self.grid, self.batch = count, self.backbone.grid, len(images)
        self._next = self.backbone.depth - count
        self._way = encoder.begin(images)
        # The block of this encoder that ends each position.
        self._ends = {blocks[0].stop - 1: p for p, blocks in enumerate(encoder.schedule)}
        for i in range(self._next):
            encoder.step(self._way, self.role, i)
            self._follow(i)

    def _follow(self, i: int) -> None:
        """If block `i` ends a position: run the other encoders and the adapter."""
        if i in self._ends:
            self.encoder.advance(self._way, self._ends[i], done=self.role)

    def look(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        backbone, tokens = self.backbone, self._way.tokens[self.role]
        joint = torch.cat([extra.to(tokens.dtype), tokens], 1)
        seen: Tensor = backbone.within(backbone.finish, joint, self._way.states[self.role])
        expect(backbone, "finish()'s result", seen, joint.shape)
        first = extra.shape[1]
        patches = seen[:, first + backbone.num_prefix_tokens :]
        return seen[:, :first], patches.transpose(1, 2).unflatten(2, self.grid)

    def step(self, extra: Tensor, visible: Tensor | None = None) -> Tensor:
        if self.count == 0:
            raise PluginError("the decoder steps further than the blocks that it declares to join")
        i, tokens, block = self._next, self._way.tokens[self.role], self.backbone.block_with
        given = (block, i, tokens, self._way.states[self.role], extra.to(tokens.dtype), visible)
        if self.encoder.recomputes(self.encoder.position(self.role, i)):
            after, joined = checkpoint(self.backbone.within, *given, use_reentrant=False)
        else:
            after, joined = self.backbone.within(*given)
        what = f"block_with({i})'s result"
        after = self.backbone.refine(i, expect(self.backbone, what, after, tokens.shape))
        self._way.tokens[self.role] = after
        self._follow(i)
        self._next, self.count = i + 1, self.count - 1
        return expect(self.backbone, what, joined, extra.shape)

    def end(self) -> Encoded:
        """The outputs of the encoders once the decoder is done."""
        if self.count:
            raise PluginError(
                f"the decoder left {self.count} of the blocks that it declares to join"
            )
        return self.encoder.end(self._way)
