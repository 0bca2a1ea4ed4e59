"""Text towers of open_clip, stepped so that context can be injected after the first token."""

from __future__ import annotations

import json
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from mfuser import MFuserError, WeightsError
from mfuser.errors import MissingExtraError
from mfuser_plugins.backbones._miniature import tokenizer_file

POOLS = ("argmax", "eos", "last", "first")


def inject(tokens: Tensor, context: Tensor | None) -> tuple[Tensor, int]:
    """(K, L, D), (n, D) -> (K, L + n, D) with the context after the first token; n."""
    if context is None or len(context) == 0:
        return tokens, 0
    rows = context.to(tokens.dtype).expand(len(tokens), -1, -1)
    return torch.cat([tokens[:, :1], rows, tokens[:, 1:]], dim=1), len(context)


def check_context(context: Tensor | None, width: int, slots: int, positions: int) -> None:
    """Raises MFuserError unless the context has the token width and all of it has a position."""
    if context is None:
        return
    if context.dim() != 2 or context.shape[1] != width:
        raise MFuserError(
            f"the prompt context is {tuple(context.shape)}; this text encoder's tokens need "
            f"(n, {width})"
        )
    if slots + len(context) > positions:
        raise MFuserError(
            f"{len(context)} context tokens and {slots} slots do not fit into the "
            f"{positions} positions of the text encoder; lower prompt.context or prompt.slots (or "
            "raise its context_length, where that was cut)"
        )


class ClipText:
    """The text side of an open_clip model. Refers to the model, owns no parameter.

    Plain CLIP keeps the parts on the model, CustomTextCLIP in `model.text`; a bare
    TextTransformer works, too.
    """

    takes_class_token = False

    def __init__(self, model: nn.Module, name: str) -> None:
        own = isinstance(model, CLIP | TextTransformer)
        parts: Any = model if own else model.get_submodule("text")
        if not isinstance(parts, CLIP | TextTransformer):
            raise MFuserError(
                f"open_clip model '{name}' has a text tower of class {type(parts).__name__}, which "
                "is not supported; supported are CLIP's own text transformers (CLIP, EVA02-CLIP, "
                "SigLIP, SigLIP 2, CLIPA, ViTamin, PE, MobileCLIP). For a Hugging Face text "
                'encoder use name = "dual_encoder"'
            )
        plain = isinstance(parts, CLIP)
        self.parts = parts
        self.pool: str = parts.text_pool_type if plain else parts.pool_type
        self.eos_id = int(parts.text_eos_id if plain else parts.eos_id)
        if self.pool not in POOLS:
            raise MFuserError(
                f"open_clip model '{name}' pools text by '{self.pool}'; supported are "
                f"{', '.join(POOLS)}"
            )
        appended = not plain and (parts.cls_emb is not None or parts.use_pad_mask)
        if appended != self.takes_class_token:
            raise MFuserError(
                f"open_clip model '{name}': its text tower "
                f"{'appends a class token or masks padding' if appended else 'has no class token'}"
                ", which is not supported in a model of this class"
            )
        self.width = int(parts.token_embedding.weight.shape[1])
        self.vocabulary = int(parts.token_embedding.weight.shape[0])
        self.positions = int(parts.positional_embedding.shape[0])

    def keep_positions(self, positions: int) -> None:
        """Cut the position table. Raises MFuserError if it has fewer rows."""
        if positions > self.positions:
            raise MFuserError(
                f"context_length = {positions}: the text encoder has {self.positions} positions"
            )
        table = self.parts.positional_embedding
        self.parts.positional_embedding = nn.Parameter(
            table.detach()[:positions].clone(), requires_grad=table.requires_grad
        )
        self.positions = positions

    @property
    def text_dim(self) -> int:
        projection = self.parts.text_projection
        if projection is None:
            return self.width
        return int(
            projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
        )

    def encode(self, ids: Tensor, context: Tensor | None) -> Tensor:
        """ids (K, L), context (n, width) -> (K, C). Raises MFuserError if L + n has no room."""
        parts = self.parts
        check_context(context, self.width, ids.shape[1], self.positions)
        dtype = parts.positional_embedding.dtype  # single where the matrices alone are half
        tokens, n = inject(parts.token_embedding(ids).to(dtype), context)
        length = tokens.shape[1]
        tokens = tokens + parts.positional_embedding[:length].to(dtype)
        # The library's mask is of full size and is not cut to short ids.
        mask = None if parts.attn_mask is None else parts.attn_mask[:length, :length]
        tokens = parts.ln_final(parts.transformer(tokens, attn_mask=mask))
        pooled = tokens[torch.arange(len(ids), device=ids.device), self._pooled(ids, n)]
        projection = parts.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection

    def _pooled(self, ids: Tensor, n: int) -> Tensor:
        """(K,) positions, in the sequence with n context tokens, that are read."""
        if self.pool == "first":
            return ids.new_zeros(len(ids))
        if self.pool == "last":
            return ids.new_full((len(ids),), ids.shape[1] + n - 1)
        marked = ids if self.pool == "argmax" else ids.eq(self.eos_id).int()
        index = marked.argmax(dim=-1)
        return torch.where(index > 0, index + n, index)


def tokenize(tokenizer: Any, names: list[str], slots: int, vocabulary: int) -> Tensor:
    """Names -> ids (K, slots). Raises MFuserError if a name does not fit."""
    needed = {name: _length(tokenizer, name) for name in names}
    longest = max(needed, key=lambda name: needed[name], default="")
    if names and needed[longest] > slots:
        raise MFuserError(
            f"the class name '{longest}' takes {needed[longest]} tokens, start and end included, "
            f"and there are {slots} slots; set prompt.slots = {needed[longest]} or more"
        )
    ids: Tensor = tokenizer(names, context_length=slots)
    if len(names) and int(ids.max()) >= vocabulary:
        raise MFuserError(
            f"the tokenizer gives id {int(ids.max())}, and the text encoder knows "
            f"{vocabulary} tokens: the two do not match"
        )
    return ids


def _length(tokenizer: Any, name: str) -> int:
    if isinstance(tokenizer, HFTokenizer):
        return len(tokenizer.tokenizer(tokenizer.clean_fn(name)).input_ids)
    return len(tokenizer.encode(name)) + 2


def simple_tokenizer(**options: Any) -> SimpleTokenizer:
    """CLIP's, which ships with open_clip. Models share it, and so do copies of a model."""
    return _read(SimpleTokenizer, **options)


def _read(kind: type, *source: str, **options: Any) -> Any:
    """A tokenizer, read once in a process: CLIP's 49,000 merges take a tenth of a second."""
    key = (kind, *source, json.dumps(options, sort_keys=True))
    if key not in _tokenizers:
        _tokenizers[key] = kind(*source, **options)
    return _tokenizers[key]


_tokenizers: dict[tuple[Any, ...], Any] = {}


def load_tokenizer(model: str, text_cfg: dict[str, Any], given: str | None) -> Any:
    """The tokenizer of an open_clip model: CLIP's, which ships, or a Hugging Face one.

    Raises WeightsError if it would have to be downloaded and cannot be.
    """
    source = given or text_cfg.get("hf_tokenizer_name")
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    if name := options.get("bpe_path"):
        options["bpe_path"] = tokenizer_file(str(name))
    if given == "simple" or not source:
        return simple_tokenizer(**({} if given == "simple" else options))
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"the tokenizer of '{model}'") from error
    mode = text_cfg.get("tokenizer_mode")
    try:
        return _read(HFTokenizer, source, tokenizer_mode=mode, local_files_only=True, **options)
    except Exception as offline:
        if given is None:
            from mfuser_plugins.backbones._weights import reachable

            if reachable():
                return _read(HFTokenizer, source, tokenizer_mode=mode, **options)
        cause = f"{type(offline).__name__}: {' '.join(str(offline).split())[:120]}"
        raise WeightsError(
            f"the tokenizer '{source}' of open_clip model '{model}' cannot be loaded ({cause}): "
            f"run `hf download {source}` where there is a network, or give its folder: "
            'tokenizer = "path"'
        ) from offline
