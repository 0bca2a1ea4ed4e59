"""Text towers of open_clip beside its own transformer: CoCa's, and those of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfuser import MFuserError, WeightsError
from mfuser_plugins.backbones._hub import transformers
from mfuser_plugins.backbones._text import ClipText, check_context, inject


class CocaText(ClipText):
    """CoCa appends a class token, pools it before the norm, and masks padding.

    In the published models the class column of the mask comes first, a bug they were trained with
    (`correct_cls_mask`).
    """

    takes_class_token = True

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model, name)
        self.positions -= 1

    def keep_positions(self, positions: int) -> None:
        super().keep_positions(positions + 1)
        self.positions -= 1

    def encode(self, ids: Tensor, context: Tensor | None) -> Tensor:
        parts = self.parts
        check_context(context, self.width, ids.shape[1], self.positions)
        dtype = parts.positional_embedding.dtype  # single where the matrices alone are half
        tokens, n = inject(parts.token_embedding(ids).to(dtype), context)
        last = parts.cls_emb.to(dtype).expand(len(ids), 1, -1)
        tokens = torch.cat([tokens, last], dim=1)
        length = tokens.shape[1]
        # Context must not count as padding: any other id works.
        filled = ids.new_full((len(ids), n), parts.pad_id + 1)
        filled = torch.cat([ids[:, :1], filled, ids[:, 1:]], dim=1)
        # Private: the public forward takes no tokens, and this mask has the class column's bug.
        mask = parts._build_additive_mask(filled, length, tokens.dtype)
        if parts.attn_mask is not None:
            mask = parts.attn_mask[:length, :length][None] + mask
        tokens = tokens + parts.positional_embedding[:length].to(dtype)
        pooled = parts.ln_final(parts.transformer(tokens, attn_mask=mask)[:, -1])
        projection = parts.text_projection
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


class HuggingFaceTower:
    """open_clip's HFTextEncoder. Refers to the model, owns no parameter."""

    def __init__(self, tower: Any, name: str) -> None:
        self.tower, self.name = tower, name
        table = tower.transformer.get_input_embeddings().weight
        self.vocabulary, self.width = int(table.shape[0]), int(table.shape[1])
        config = tower.config
        self.pad = int(config.pad_token_id)
        self.positions = 1 << 20
        if config.model_type in ("roberta", "xlm-roberta"):
            # Their positions begin behind that of the padding.
            self.positions = int(config.max_position_embeddings) - self.pad - 1

    @property
    def text_dim(self) -> int:
        return int(self.tower.output_dim)

    def keep_positions(self, positions: int) -> None:
        raise MFuserError(
            f"context_length is for open_clip's own text towers; that of '{self.name}' is "
            "Hugging Face's"
        )

    def encode(self, ids: Tensor, context: Tensor | None) -> Tensor:
        """ids (K, L), context (n, width) -> (K, C). Raises MFuserError if L + n has no room."""
        check_context(context, self.width, ids.shape[1], self.positions)
        tower = self.tower
        tokens, n = inject(tower.transformer.get_input_embeddings()(ids), context)
        mask = (ids != self.pad).long()
        mask = torch.cat([mask[:, :1], mask.new_ones(len(ids), n), mask[:, 1:]], dim=1)
        out = tower.transformer(inputs_embeds=tokens, attention_mask=mask)
        pooled: Tensor = tower.proj(tower.pooler(out, mask))
        return pooled


def reachable_config(name: str, source: str) -> None:
    """Raises WeightsError unless the configuration of a Hugging Face tower can be read: open_clip
    needs it also without weights."""
    package = transformers(f"the text tower of '{name}'")
    if Path(source).is_dir():
        return
    try:
        package.AutoConfig.from_pretrained(source, local_files_only=True)
    except Exception as offline:
        from mfuser_plugins.backbones._weights import reachable

        if not reachable():
            raise WeightsError(
                f"open_clip model '{name}' has the Hugging Face text tower '{source}', whose "
                f"configuration is not on this machine: run `hf download {source} config.json` "
                "where there is a network, or give a folder that has it: options.text_cfg = "
                '{hf_model_name = "path"}'
            ) from offline
