"""Image towers of open_clip: its own vision transformers and those of timm."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CLIPVisionCfg, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import AttentionPoolLatent, DropPath
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from mfuser import MFuserError, VisionLanguageBackbone
from mfuser_plugins.backbones._resample import Resampling, resample_kernel, resample_positions
from mfuser_plugins.backbones._stepping import Size, Stepped, Stepper, unmasked
from mfuser_plugins.backbones._text import ClipText, load_tokenizer, tokenize
from mfuser_plugins.backbones._text_towers import CocaText, HuggingFaceTower, reachable_config
from mfuser_plugins.backbones._timm_families import stepper_class


class ClipStepper(Stepper):
    """open_clip's own VisionTransformer: a class token, absolute positions, no state."""

    def __init__(self, tower: Any, how: Resampling) -> None:
        self.tower = tower
        self.how = how
        self.class_embeddings = 1
        self.embed_dim = int(tower.conv1.out_channels)
        self.depth = len(self.blocks)
        self.num_prefix_tokens = 1
        tables = ["conv1.weight", "positional_embedding"]
        super().__init__(tuple(tower.image_size), tuple(tower.patch_size), tables)

    @property
    def sized(self) -> nn.Module:
        return self.tower

    @property
    def blocks(self) -> Any:
        return self.tower.transformer.resblocks

    def grid_of(self, size: Size) -> Size:
        patch = self.tower.patch_size
        return size[0] // patch[0], size[1] // patch[1]

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        tower = self.tower
        if self.class_embeddings == 1:
            # Private, but the only place where open_clip stops before its blocks.
            return tower._embeds(images), None
        patches = tower.conv1(images).flatten(2).transpose(1, 2)
        first = (self.class_embeddings * tower.class_embedding).expand(len(patches), 1, -1)
        return tower.ln_pre(torch.cat([first, patches], 1) + tower.positional_embedding), None

    def block(self, i: int, tokens: Tensor, state: Any) -> Tensor:
        return self.blocks[i](tokens)

    def no_extra(self) -> str | None:
        return unmasked(self.blocks)

    def joint_block(
        self, i: int, tokens: Tensor, state: Any, extra: int, attends: Tensor | None
    ) -> Tensor:
        mask = None
        if attends is not None:
            # torch's own attention: one additive mask for each image and head.
            mask = tokens.new_zeros(attends.shape).masked_fill(~attends, float("-inf"))
            mask = mask.expand(-1, self.blocks[i].attn.num_heads, -1, -1).flatten(0, 1)
        return self.blocks[i](tokens, attn_mask=mask)

    def _resize(self, size: Size, patch_size: Size) -> None:
        tower, kernel, table = self.tower, self.tower.conv1.weight, self.tower.positional_embedding
        tower.image_size, tower.patch_size = size, patch_size
        tower.grid_size = self.grid_of(size)
        rows = tower.grid_size[0] * tower.grid_size[1] + 1
        if rows != len(table):
            tower.positional_embedding = nn.Parameter(
                table.new_empty(rows, table.shape[1]), requires_grad=table.requires_grad
            )
        if patch_size != tower.conv1.kernel_size:
            tower.conv1.kernel_size = tower.conv1.stride = patch_size
            tower.conv1.weight = nn.Parameter(
                kernel.new_empty(*kernel.shape[:2], *patch_size), requires_grad=kernel.requires_grad
            )

    def _fill(self, source: dict[str, Tensor], source_grid: Size) -> None:
        tower = self.tower
        table = source["positional_embedding"]
        rows = resample_positions(table, source_grid, tower.grid_size, 1, self.how)
        tower.positional_embedding.copy_(rows)
        kernel = source["conv1.weight"]
        tower.conv1.weight.copy_(resample_kernel(kernel, self.patch_size, self.how))


class ClipBackbone(Stepped, VisionLanguageBackbone):
    """An open_clip model whose image tower is open_clip's own vision transformer."""

    drop_path = 0.0
    """Stochastic depth while training, where the spec asks for it."""

    def __init__(self, model: Any, stepper: Stepper, name: str, text_cfg: dict[str, Any]) -> None:
        super().__init__(model, stepper)
        self.name = name
        self.text = text_tower(model, name)
        self.text_dim = self.text.text_dim
        self.context_dim = self.text.width
        self.alignment: Literal["softmax", "sigmoid"] = (
            "softmax" if model.logit_bias is None else "sigmoid"
        )
        self.text_cfg = text_cfg
        self.tokenizer_source: str | None = None

    def adapt(
        self,
        class_embeddings: int = 1,
        drop_path: float = 0.0,
        tanh_gelu: bool = False,
        context_length: int | None = None,
    ) -> None:
        """Depart from the library as `OpenClipSpec` describes. Raises MFuserError where the
        tower is of another class."""
        if class_embeddings != 1 or drop_path:
            if not isinstance(self.stepper, ClipStepper):
                raise MFuserError(
                    "class_embeddings and drop_path are for image towers of open_clip's own class "
                    f"(ViT-*); that of '{self.name}' is timm's"
                )
            self.stepper.class_embeddings = class_embeddings
        if drop_path:
            blocks = self.stepper.blocks
            for i, block in enumerate(blocks):
                rate = drop_path * i / max(len(blocks) - 1, 1)
                block.ls_1 = nn.Sequential(block.ls_1, DropPath(rate))
                block.ls_2 = nn.Sequential(block.ls_2, DropPath(rate))
            self.drop_path = drop_path
            self.eval()
        if tanh_gelu:
            exact = [m for m in self.model.modules() if isinstance(m, nn.GELU)]
            if not exact:
                raise MFuserError(f"tanh_gelu: '{self.name}' has no GELU")
            for module in exact:
                module.approximate = "tanh"
        if context_length is not None:
            self.text.keep_positions(context_length)

    def train(self, mode: bool = True) -> ClipBackbone:
        super().train(mode)
        # timm's towers (ViTamin) have stochastic depth of their own, which stays off.
        for module in self.modules() if self.drop_path else ():
            if isinstance(module, DropPath):
                module.train(mode)
        return self

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        # CLIP adds the fused streams before its norm, so that is part of `project`.
        return tokens

    def project(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        tower: Any = self.model.get_submodule("visual")
        if tower.final_ln_after_pool and tower.pool_type == "avg":
            pooled, normed = tower.ln_post(tokens[:, 1:].mean(dim=1)), tower.ln_post(tokens)
        else:
            normed = tower.ln_post(tokens)
            pooled = normed[:, 0] if tower.pool_type == "tok" else normed[:, 1:].mean(dim=1)
        return (pooled @ tower.proj)[:, None], normed[:, 1:] @ tower.proj

    def tokenize(self, class_names: list[str], slots: int) -> Tensor:
        # Not kept here: copies of the model would copy its tables of words.
        tokenizer = load_tokenizer(self.name, self.text_cfg, self.tokenizer_source)
        return tokenize(tokenizer, class_names, slots, self.text.vocabulary)

    def encode_text(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        return self.text.encode(ids, context)

    def logit_scale_bias(self) -> tuple[Tensor, Tensor | None]:
        model: Any = self.model
        bias = model.logit_bias
        return model.logit_scale.exp().reshape(()), None if bias is None else bias.reshape(())


class CocaBackbone(ClipBackbone):
    """CoCa, whose attention pool has 256 queries of another width than the tokens.

    The global embedding is the library's. No token can be a query, so the dense ones are each
    token's own value through the pool: what it would return if it attended to that token only.
    """

    def project(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        tower: Any = self.model.get_submodule("visual")
        pool = tower.attn_pool
        pooled = tower.ln_post(pool(tokens))[:, 0]
        attention = pool.attn
        width = attention.embed_dim
        weight = attention.v_proj_weight
        if weight is None:
            weight = attention.in_proj_weight[2 * width :]
        values = F.linear(pool.ln_k(tokens[:, 1:]), weight, attention.in_proj_bias[2 * width :])
        dense = tower.ln_post(attention.out_proj(values))
        return (pooled @ tower.proj)[:, None], dense @ tower.proj


class TimmClipBackbone(ClipBackbone):
    """An open_clip model whose image tower is timm's: EVA02-CLIP, SigLIP, ViTamin, PE."""

    def finish(self, tokens: Tensor, state: Any) -> Tensor:
        # An fc_norm comes after pooling and stays in `project`.
        trunk: Any = self.model.get_submodule("visual.trunk")
        return trunk.norm(tokens)

    def project(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        tower: Any = self.model.get_submodule("visual")
        trunk = tower.trunk
        pooled = tower.head(trunk.forward_head(tokens))
        dense = tokens[:, self.num_prefix_tokens :]
        if attention_pool(trunk) is not None:
            # timm's ViT hides the prefix tokens from the pool, its Eva shows them.
            shown = self._pool_keys(trunk, tokens)
            dense = attend(trunk.attn_pool, dense, shown)
        dense = tower.head(trunk.head(trunk.head_drop(trunk.fc_norm(dense))))
        return pooled[:, None], dense

    @staticmethod
    def _pool_keys(trunk: Any, tokens: Tensor) -> Tensor:
        if isinstance(trunk, timm.models.VisionTransformer) and not trunk.pool_include_prefix:
            return tokens[:, trunk.num_prefix_tokens :]
        return tokens


def attend(pool: Any, queries: Tensor, tokens: Tensor) -> Tensor:
    """timm's attention pool with `queries` (B, Q, D) in place of its latent -> (B, Q, D).

    With every patch token as query it gives dense embeddings in the joint space.
    """
    b, n, d = tokens.shape
    q = pool.q(queries).reshape(b, -1, pool.num_heads, pool.head_dim).transpose(1, 2)
    k, v = pool.kv(tokens).reshape(b, n, 2, pool.num_heads, pool.head_dim).permute(2, 0, 3, 1, 4)
    q, k = pool.q_norm(q), pool.k_norm(k)
    if pool.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q * pool.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    out = pool.proj_drop(pool.proj(out.transpose(1, 2).reshape(b, -1, d)))
    if pool.mlp is not None:
        out = out + pool.mlp(pool.norm(out))
    return out


def attention_pool(trunk: Any) -> Any:
    """A timm trunk's attention pool; None where its class has none."""
    return None if isinstance(trunk, VisionTransformerRelPos) else trunk.attn_pool


def text_tower(model: Any, name: str) -> ClipText | HuggingFaceTower:
    """The text side by its class. Raises MFuserError for classes that are not supported."""
    if not isinstance(model, CLIP) and isinstance(model.text, HFTextEncoder):
        return HuggingFaceTower(model.text, name)
    if isinstance(model, CoCa):
        return CocaText(model, name)
    return ClipText(model, name)


class SizedTimmModel(TimmModel):
    """open_clip's TimmModel whose trunk takes further options (depth, embed_dim, …)."""

    def __init__(self, cfg: CLIPVisionCfg, embed_dim: int, options: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.image_size = (cfg.image_size, cfg.image_size)
        if cfg.timm_drop_path is not None:
            options = {"drop_path_rate": cfg.timm_drop_path, **options}
        projected = cfg.timm_proj == "linear"
        if projected:
            # Pooled as timm does by default, unless the configuration says otherwise.
            self.trunk = timm.create_model(cfg.timm_model_name, **options)
            pool = {"global_pool": cfg.timm_pool} if cfg.timm_pool else {}
            self.trunk.reset_classifier(0, **pool)
        else:
            classes = 0 if cfg.timm_proj == "none" else embed_dim
            self.trunk = timm.create_model(
                cfg.timm_model_name, num_classes=classes, global_pool=cfg.timm_pool, **options
            )
        self.head = nn.Sequential()
        if projected:
            self.head.add_module("drop", nn.Dropout(cfg.timm_drop))
            linear = nn.Linear(self.trunk.num_features, embed_dim, bias=cfg.timm_proj_bias)
            self.head.add_module("proj", linear)


TRUNKS = (timm.models.VisionTransformer, timm.models.Eva, VisionTransformerRelPos)
"""timm's classes whose tokens lead into the joint space."""


def create(name: str, cfg: dict[str, Any]) -> Any:
    """An open_clip model from its configuration, without weights.

    Raises MFuserError for towers that cannot be stepped, and for a configuration that cannot be
    built.
    """
    cfg = {key: dict(value) if isinstance(value, dict) else value for key, value in cfg.items()}
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    custom = cfg.pop("custom_text", False)
    if text.get("hf_model_name"):
        text["hf_model_pretrained"], custom = False, True
        reachable_config(name, text["hf_model_name"])
    trunk_options = vision.pop("timm_model_kwargs", None)
    tower = None
    try:
        if trunk_options is not None:
            if not vision.get("timm_model_name"):
                raise ValueError("timm_model_kwargs are for towers of timm; this one is not")
            tower = SizedTimmModel(CLIPVisionCfg(**vision), cfg["embed_dim"], trunk_options)
            # Replaced below; the smallest tower that open_clip builds.
            vision = {"layers": 1, "width": 1, "head_width": 1, "image_size": 1, "patch_size": 1}
        vision["timm_model_pretrained"] = False
        parts = {**cfg, "vision_cfg": vision, "text_cfg": text}
        kind = CoCa if "multimodal_cfg" in cfg else CustomTextCLIP if custom else CLIP
        model = kind(**parts)
    except Exception as error:
        raise MFuserError(
            f"open_clip cannot build '{name}' with these options: {type(error).__name__}: {error}"
        ) from error
    if tower is not None:
        model.visual = tower
    return model


def wrap(model: Any, name: str, text_cfg: dict[str, Any], how: Resampling) -> ClipBackbone:
    """The backbone around an open_clip model. Raises MFuserError if its tower has no stepper."""
    tower = model.visual
    backbone: ClipBackbone
    if type(tower) is VisionTransformer:
        if tower.pool_type not in ("tok", "avg"):
            raise MFuserError(f"open_clip model '{name}' pools '{tower.pool_type}': not supported")
        pooled = tower.attn_pool is not None
        backbone = (CocaBackbone if pooled else ClipBackbone)(
            model, ClipStepper(tower, how), name, text_cfg
        )
        joint = int(tower.proj.shape[1])
    elif isinstance(tower, TimmModel):
        trunk = tower.trunk
        if not isinstance(trunk, TRUNKS):
            raise MFuserError(
                f"open_clip model '{name}' has an image tower of class {type(trunk).__name__} "
                "(timm), which has no stream of tokens up to its joint space; use a vision "
                "transformer (ViT-*, EVA*, *SigLIP*, ViTamin-*)"
            )
        family = stepper_class(trunk, f"{name}' (its image tower '{type(trunk).__name__}")
        pool = attention_pool(trunk) if trunk.global_pool in ("map", "prr") else None
        if pool is not None and not isinstance(pool, AttentionPoolLatent):
            raise MFuserError(f"open_clip model '{name}' pools by {type(pool).__name__}")
        backbone = TimmClipBackbone(model, family(trunk, how), name, text_cfg)
        with torch.no_grad():
            where = next(trunk.parameters()).device
            probe = torch.zeros(1, backbone.token_shape.num_tokens, backbone.embed_dim).to(where)
            joint = backbone.project(probe)[0].shape[-1]
    else:
        raise MFuserError(
            f"open_clip model '{name}' has an image tower of class {type(tower).__name__}, which "
            "has no stream of tokens; use a vision transformer (ViT-*, EVA*, *SigLIP*, ViTamin-*)"
        )
    if joint != backbone.text_dim:
        raise MFuserError(
            f"open_clip model '{name}': images are embedded in {joint} dimensions and text in "
            f"{backbone.text_dim}; set options.embed_dim = {joint}"
        )
    return backbone
