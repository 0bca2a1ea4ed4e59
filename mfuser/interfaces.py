"""The interfaces between the parts of a model.

Letters used in shapes throughout: B batch, N tokens, T patch tokens, L sequence, D width,
C joint text-image width, K classes, Q queries, (h, w) patch grid, (H, W) pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mfuser import half
from mfuser.errors import MFuserError
from mfuser.shapes import TokenShape

IGNORE = 255
"""Label of the pixels that losses and scores leave out."""


@dataclass(frozen=True)
class Stream:
    """One encoder's tokens on their way through its blocks.

    tokens: (B, N, D), prefix tokens first, then the grid row by row.
    grid: (h, w).
    state: opaque, belongs to one `embed` call (rotary tables, relative-position bias, …).
    """

    tokens: Tensor
    grid: tuple[int, int]
    state: Any = None


class TokenRefiner(nn.Module, ABC):
    """Changes an encoder's patch tokens after each of its blocks; a tuning sets it as `refiner` of
    the backbone."""

    @abstractmethod
    def forward(self, i: int, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (B, T, D) of `grid` (h, w) after block `i` -> the same, changed."""

    def link(self, queries: int, width: int) -> bool:
        """Optional: make ready to give the decoder its first queries, (queries, width).

        Called once, before anything trains, where the decoder takes them. False: it gives none.
        """
        return False

    def queries(self) -> Tensor:
        """The decoder's first queries (queries, width), after `link`."""
        raise NotImplementedError


class VisionBackbone(nn.Module, ABC):
    """A transformer image encoder that can be stepped block by block.

    `embed`, then every `block` in order, then `finish` equals the library's own forward up to its
    final norm. Blocks may not be skipped, reordered or called twice; tokens between blocks may
    change in value, never in number or order.

    Always in evaluation mode (no drop path, no patch dropout), frozen or not.
    """

    embed_dim: int
    """Width D of the tokens."""
    depth: int
    """Number of blocks, at least 1."""
    num_prefix_tokens: int
    """Tokens before the patches *while stepping* (CaiT's class token joins later: it has none)."""
    patch_size: tuple[int, int]
    """(height, width) of a patch in pixels."""
    image_size: tuple[int, int]
    """(height, width) that `embed` accepts; set by `resize`."""
    grid: tuple[int, int]
    """Patches (h, w) of an image of `image_size`; set by `resize`."""
    license: str | None = None
    """License of the weights where their publisher states one."""
    always_trains: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the names of parameters that train although the backbone is frozen."""
    tuned: frozenset[str] = frozenset()
    """Names of the parameters that a tuning added or made trainable; set where models are built."""

    lowered: torch.dtype | None = None
    """Half precision that its matrices are held and multiplied in (`model.precision.lower`)."""

    exact: dict[str, list[float]]
    """Where it is lowered: two values of each matrix as they were, which identify it."""

    refiner: TokenRefiner
    """Set by a tuning, or not there: changes the tokens after each block (`step`)."""

    mean: Tensor
    """Buffer (1, 3, 1, 1): mean of the images the weights were trained on; see `set_statistics`."""
    std: Tensor
    """Buffer (1, 3, 1, 1): their standard deviation."""

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Image statistics (RGB in [0, 1]) of the weights: from their tag, never guessed."""
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1] -> standardized, in the precision of the weights."""
        return ((images - self.mean) / self.std).to(self.mean.dtype)

    @property
    def token_shape(self) -> TokenShape:
        return TokenShape(self.embed_dim, self.grid, self.num_prefix_tokens)

    @abstractmethod
    def resize(self, image_size: tuple[int, int], patch_size: int | None = None) -> None:
        """Resample positions (and the patch kernel) for another image or patch size, in place.

        Always from the original tables, so that repeated calls do not blur.
        """

    @abstractmethod
    def embed(self, images: Tensor) -> Stream:
        """Normalized images (B, 3, H, W) of `image_size` -> the tokens before the first block.

        Raises MFuserError if the images have another size.
        """

    @abstractmethod
    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        """(B, N, D) -> (B, N, D): transformer block `i`."""

    def step(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        """(B, N, D) -> (B, N, D): block `i` and what a tuning does after it."""
        return self.refine(i, self.within(self.block, i, tokens, state))

    def within(self, method: Callable[..., Any], *given: Any) -> Any:
        """The result of one of its methods, in single precision: matrices that are lowered are
        multiplied in their own precision, and everything else stays in single."""
        if self.lowered is None:
            return method(*given)
        with half.multiplying(next(self.parameters()).device.type, self.lowered):
            return half.single(method(*given))

    def refine(self, i: int, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D): what a tuning does after block `i`."""
        refiner = self._modules.get("refiner")
        if refiner is None:
            return tokens
        n = self.num_prefix_tokens
        refined: Tensor = refiner(i, tokens[:, n:], self.grid)
        return torch.cat([tokens[:, :n], refined], dim=1) if n else refined

    @abstractmethod
    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        """(B, N, D) -> (B, N, D): the final norm where it belongs before `project`, or nothing."""

    def no_extra(self) -> str | None:
        """Why further tokens cannot join its blocks; None: they can, by `block_with`."""
        return "it has no block_with(), by which they would join its own"

    def block_with(
        self, i: int, tokens: Tensor, state: Any, extra: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Block `i` on its own tokens (B, N, D) and on further ones (B, Q, D), which have no place
        in the grid -> both.

        All attend to all, but for `visible` (B, Q, T), bool: the patches that each further token
        sees. None: all of them. Where this works, `finish` norms each token by itself.
        """
        raise NotImplementedError

    def block_modules(self) -> list[nn.Module]:
        """The module behind each block, in order: where tuning finds the layers that it changes.

        Those of `self.blocks`, unless overridden. Raises MFuserError where there is none per block.
        """
        blocks = getattr(self, "blocks", None)
        if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) != self.depth:
            raise MFuserError(
                f"{type(self).__name__} does not say which module is behind each of its "
                f"{self.depth} blocks: let block_modules() return them"
            )
        return list(blocks)

    def train(self, mode: bool = True) -> VisionBackbone:
        super().train(False)
        return self


class VisionLanguageBackbone(VisionBackbone):
    """A vision backbone with an aligned text encoder."""

    text_dim: int
    """C: width of the joint space."""
    context_dim: int
    """Width of the text encoder's tokens, where prompt context is injected (not C)."""
    alignment: Literal["softmax", "sigmoid"] = "softmax"
    """The contrastive loss of its pretraining: CLIP's over all classes, SigLIP's of each alone."""

    def project(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        """(B, N, D) after `finish` -> the joint space: global (B, 1, C), dense (B, T, C)."""
        raise NotImplementedError

    def tokenize(self, class_names: list[str], slots: int) -> Tensor:
        """Class names -> ids (K, slots), int64, start and end tokens included.

        Raises MFuserError if a name does not fit, saying how many slots it needs.
        """
        raise NotImplementedError

    def encode_text(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        """ids (K, slots), context (n, context_dim) after the first token -> (K, C).

        With an empty context it equals the library's own text encoding of `ids`.
        """
        raise NotImplementedError

    def logit_scale_bias(self) -> tuple[Tensor, Tensor | None]:
        """The contrastive temperature exp(logit_scale) and, for sigmoid models, the bias."""
        raise NotImplementedError


class FusionAdapter(nn.Module, ABC):
    """Runs after a pair of blocks; the offsets it returns are added to both encoders' tokens."""

    @abstractmethod
    def forward(
        self,
        vfm_tokens: Tensor | None,
        vlm_tokens: Tensor | None,
        vfm_grid: tuple[int, int] | None = None,
        vlm_grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens (B, N_v, D_v), (B, N_l, D_l) -> offsets of the same shapes.

        With one encoder alone the other's tokens, grid and offset are None.
        """


class ManyFusionAdapter(nn.Module, ABC):
    """A fusion adapter of any number of encoders, for pairings whose VFMs are a list."""

    @abstractmethod
    def forward(self, tokens: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
        """Tokens (B, N_i, D_i) of the VFMs in their order and then of the VLM, if there is one ->
        offsets of the same shapes."""


class TextEnhancer(nn.Module, ABC):
    """Turns class text embeddings into the class queries of an image."""

    @abstractmethod
    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """Class embeddings (B, K, C), visual tokens (B, 1 + T, C), global first -> (B, K, C)."""


@dataclass
class DecoderOutput:
    """Predictions, from the first to the last (deep supervision); the last one counts.

    masks: each (B, Q, h, w), logits. classes: each (B, Q, K + 1), logits, "no object" last; empty
    for decoders that answer per pixel (then Q = K). extra: anything else that `loss` needs.
    """

    masks: list[Tensor]
    classes: list[Tensor] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class LastBlocks(ABC):
    """The last blocks of an encoder, in the hands of a decoder whose own tokens join them.

    What stands between the blocks (those of other encoders, fusion adapters) is run along with
    them, on the encoder's own tokens alone.
    """

    count: int
    """The blocks that are left; each `step` takes one, and none may be left over."""
    grid: tuple[int, int]
    """Patches (h, w)."""
    batch: int
    """Images B."""

    @abstractmethod
    def look(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Further tokens (B, Q, D) -> the same and the patches as a map (B, D, h, w), both as they
        stand, after the encoder's final norm."""

    @abstractmethod
    def step(self, extra: Tensor, visible: Tensor | None = None) -> Tensor:
        """The next block, on the encoder's tokens and further ones (B, Q, D) -> the latter.

        visible: (B, Q, h * w), bool, the patches that each of them attends to; None: all.
        """


class Decoder(nn.Module, ABC):
    """Predicts masks from the feature pyramid, and from class queries where there are some."""

    reads_alignment: ClassVar[bool] = False
    """Whether `forward` takes the alignment map (B, K, h, w) as its third argument."""
    scores: ClassVar[Literal["logits", "shares"]] = "logits"
    """The output of `semantic_logits`: logits, to be normalized by a softmax, or non-negative
    scores, to be normalized by their sum."""
    open_vocabulary: ClassVar[bool] = False
    """Whether it answers for any class texts, not for the classes alone that it was trained on."""
    progress: float = 1.0
    """The share of the training that is done, which the trainer sets before each of its steps: what
    anneals follows from it alone. 1 everywhere else."""
    checkpointing: bool = False
    """Set by the trainer, on the decoder and on modules in it that have the attribute: compute what
    is large again in the backward pass instead of keeping it, where they can."""
    learned_queries: tuple[int, int] | None = None
    """(number, width) of its learned queries, where an encoder's tuning may give them instead."""

    def take_queries(self) -> None:
        """Called once where a tuning gives the queries: `forward` gets them as `given` (Q, D)."""

    @abstractmethod
    def forward(self, pyramid: list[Tensor], queries: Tensor | None = None) -> DecoderOutput:
        """Features at strides 4, 8, 16, 32 (finest first), class queries (B, K, C) or None."""

    @abstractmethod
    def loss(self, output: DecoderOutput, labels: Tensor) -> dict[str, Tensor]:
        """Labels (B, H, W) int64, 255 ignored -> named scalars; their sum is minimized."""

    @abstractmethod
    def semantic_logits(self, output: DecoderOutput, size: tuple[int, int]) -> Tensor:
        """-> class scores (B, K, *size)."""


class JoiningDecoder(Decoder):
    """A decoder whose own tokens join the encoder's last blocks (`DecoderSpec.joins`)."""

    @abstractmethod
    def join(self, blocks: LastBlocks, queries: Tensor | None = None) -> DecoderOutput:
        """The blocks, to be stepped through; class texts (B, K, C) or None. There is no pyramid."""

    def forward(self, pyramid: Any, queries: Tensor | None = None) -> DecoderOutput:
        """`join`, called as a module: `LastBlocks` in place of the pyramid."""
        return self.join(pyramid, queries)


@dataclass(frozen=True)
class Sample:
    """image: uint8 (H, W, 3) RGB; label: int64 (H, W), train ids, 255 ignored; name: for people."""

    image: np.ndarray
    label: np.ndarray
    name: str


class Dataset(ABC):
    """Labeled images of one domain; plain indexing, no augmentation."""

    classes: tuple[str, ...]
    """Names of the label space, in the order of the train ids."""
    class_ids: tuple[int, ...]
    """Train ids that the dataset's labels can hold (CamVid: 11 of 19); only these are scored."""
    test_size: tuple[int, int] | None = None
    """(width, height) that images are resized into before they are segmented; None: as stored."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Raises DataError naming the file if an image or its label cannot be used.

        Called from several processes in training, from several threads in evaluation.
        """

    def name(self, index: int) -> str:
        """The sample's name, without reading it."""
        return str(index)

    def label(self, index: int) -> np.ndarray:
        """The label alone, int64 or uint8 (H, W), where that is cheaper than the whole sample."""
        return self[index].label

    def image_file(self, index: int) -> Path | None:
        """The file that the sample's image is read from, with `mfuser.data.images.read_image` and
        nothing else: training then decodes no more of it than a crop shows. None where images are
        made, or changed after reading."""
        return None

    def raw(self, index: int) -> np.ndarray | None:
        """The label as its file stores it, before any class map; None where there is no file."""
        return None

    def fingerprint(self) -> str:
        """Changes when the dataset's contents may have; keys cached statistics."""
        raise NotImplementedError
