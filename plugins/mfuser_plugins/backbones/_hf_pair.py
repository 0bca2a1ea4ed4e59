"""CLIP, MetaCLIP 2, SigLIP and SigLIP 2 of transformers, stepped on both sides."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mfuser import MFuserError, VisionLanguageBackbone
from mfuser_plugins.backbones._hf import HuggingFaceStepper
from mfuser_plugins.backbones._stepping import Stepped
from mfuser_plugins.backbones._text import check_context, inject
from mfuser_plugins.backbones._text_hf import Tokenizer


class PairBackbone(Stepped, VisionLanguageBackbone):
    """A two-tower model of transformers: `vision_model`, `text_model`."""

    stepper: HuggingFaceStepper

    def __init__(self, model: Any, stepper: HuggingFaceStepper, tokenizer: Tokenizer) -> None:
        super().__init__(model, stepper)
        self.tokenizer = tokenizer
        self._text: Any = model.text_model
        self.context_dim = int(model.config.text_config.hidden_size)
        self.text_dim = self._text_dim()

    def _text_dim(self) -> int:
        raise NotImplementedError

    def tokenize(self, class_names: list[str], slots: int) -> Tensor:
        return self.tokenizer(class_names, slots)

    def _text_tokens(self, ids: Tensor, context: Tensor | None) -> tuple[Tensor, int]:
        """Tokens before the first layer, with the context and positions; the context's length."""
        config = self._text.config
        check_context(context, self.context_dim, ids.shape[1], config.max_position_embeddings)
        embeddings = self._text.embeddings
        tokens, n = inject(embeddings.token_embedding(ids), context)
        return embeddings(inputs_embeds=tokens), n


class ClipPair(PairBackbone):
    """CLIPModel: streams are added before `post_layernorm`; causal text pooled at its end."""

    def _text_dim(self) -> int:
        model: Any = self.model
        return int(model.text_projection.out_features)

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return tokens

    def project(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        normed = self.stepper.norm(tokens)
        pooled = model.visual_projection(normed[:, 0])
        return pooled[:, None], model.visual_projection(normed[:, 1:])

    def encode_text(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        from transformers.masking_utils import create_causal_mask

        model: Any = self.model
        text = self._text
        tokens, n = self._text_tokens(ids, context)
        mask = create_causal_mask(
            config=text.config, inputs_embeds=tokens, attention_mask=None, past_key_values=None
        )
        out = text.encoder(inputs_embeds=tokens, attention_mask=mask, is_causal=True)
        tokens = text.final_layer_norm(out.last_hidden_state)
        # Old configurations say 2 where they mean the largest id (see CLIPTextModel.forward).
        end = ids if text.eos_token_id == 2 else ids.eq(text.eos_token_id).int()
        index = end.argmax(dim=-1)
        index = torch.where(index > 0, index + n, index)
        rows = torch.arange(len(ids), device=ids.device)
        return model.text_projection(tokens[rows, index])

    def logit_scale_bias(self) -> tuple[Tensor, None]:
        model: Any = self.model
        return model.logit_scale.exp().reshape(()), None


class SiglipPair(PairBackbone):
    """SiglipModel: every patch token is a query of the pooling head; text pooled at the last."""

    alignment: Literal["softmax", "sigmoid"] = "sigmoid"

    def _text_dim(self) -> int:
        text, model = int(self._text.head.out_features), self.model
        vision: Any = model.get_submodule("vision_model")
        if not vision.use_head:
            raise MFuserError("this SigLIP model has no pooling head (vision_use_head = false)")
        if text != self.embed_dim:
            raise MFuserError(
                f"this SigLIP model embeds images in {self.embed_dim} dimensions and text in {text}"
            )
        return text

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        return self.stepper.norm(tokens)

    def project(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        head: Any = self.model.get_submodule("vision_model.head")
        dense = head.attention(tokens, tokens, tokens, need_weights=False)[0]
        dense = dense + head.mlp(head.layernorm(dense))
        return head(tokens)[:, None], dense

    def encode_text(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        tokens, _ = self._text_tokens(ids, context)
        out = self._text.encoder(inputs_embeds=tokens, attention_mask=None)
        last: Tensor = self._text.final_layer_norm(out.last_hidden_state)[:, -1]
        return self._text.head(last)

    def logit_scale_bias(self) -> tuple[Tensor, Tensor | None]:
        model: Any = self.model
        return model.logit_scale.exp().reshape(()), model.logit_bias.reshape(())


PAIRS: dict[str, type[PairBackbone]] = {
    "clip": ClipPair,
    "metaclip_2": ClipPair,
    "siglip": SiglipPair,
    "siglip2": SiglipPair,
}
