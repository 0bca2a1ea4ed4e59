"""The towers in miniature: an ordinary timm ViT and an ordinary open_clip model, pretrained on the
miniature world. `register` makes both libraries know them.

vit_mini_patch8.mini-vfm in timm, mini-vlm with the weights "mini-vlm" in open_clip.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from timm.layers.hybrid_embed import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from mfuser.errors import WeightsError
from mfuser_streets.world.scenes import WORLD_VERSION

__all__ = ["VLM", "register", "vit_mini_patch8"]

FOLDER = Path(__file__).parent
SIZE = (96, 192)
"""The image size of the position table."""
MEAN, STD = (0.42, 0.42, 0.42), (0.25, 0.25, 0.25)
WIDTH, DEPTH, HEADS = 128, 6, 4
LICENSE = "apache-2.0"
VFM_MODEL, VFM, VLM = "vit_mini_patch8", "mini-vfm", "mini-vlm"
CHECKSUMS = FOLDER / "weights.json"
"""SHA-256 of the weights files that ship."""
TOLD = "miniature"
"""The key under which a weights file says what it is: name, world, recipe."""


class Stem(nn.Module):
    """Three convolutions of stride 2: patches of 8 pixels whose edges are read smoothly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (3, 32, 64, width)
        for i, (a, b) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, 3, 2, 1))
            self.add_module(f"norm{i}", nn.GroupNorm(4, b))
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, H / 8, W / 8)."""
        for i in range(3):
            images = self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(images))
            images = nn.functional.gelu(images)
        return images


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "", "num_classes": 0, "input_size": (3, *SIZE), "pool_size": None,
        "mean": MEAN, "std": STD, "first_conv": "patch_embed.backbone.conv0", "classifier": "head",
        **changes,
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {f"{VFM_MODEL}.{VFM}": _cfg(file=str(FOLDER / f"{VFM}.safetensors"), license=LICENSE)}
)


def vit_mini_patch8(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT of 1.3 M parameters with patches of 8 pixels behind a convolutional stem."""
    width = int(options.get("embed_dim", WIDTH))
    embed = functools.partial(HybridEmbed, backbone=Stem(width))
    defaults = {
        "img_size": SIZE, "patch_size": 1, "embed_dim": width, "depth": DEPTH, "num_heads": HEADS,
        "class_token": False, "global_pool": "avg", "fc_norm": False, "embed_layer": embed,
        "num_classes": 0,
    }  # fmt: skip
    return build_model_with_cfg(
        VisionTransformer,
        VFM_MODEL,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**defaults, **options},
    )


register_model(vit_mini_patch8)


@functools.cache
def register() -> None:
    """Tell open_clip of mini-vlm; timm learned of the ViT when this module was imported."""
    import open_clip

    open_clip.add_model_config(FOLDER / f"{VLM}.json")


def open_clip_tag() -> dict[str, Any]:
    """The description of the tag "mini-vlm", in the form of open_clip's own tags."""
    return {"file": str(FOLDER / f"{VLM}.safetensors"), "mean": MEAN, "std": STD}


def shipped(path: Path) -> Path:
    """A weights file of this folder, which is there, whole and of this version of the world.

    Raises WeightsError, saying how to get it.
    """
    remedy = f"reinstall mfuser, or remake it: `mfuser world pretrain {path.stem.split('-')[1]}`"
    if not path.is_file():
        raise WeightsError(f"the weights {path} are missing: {remedy}")
    expected = json.loads(CHECKSUMS.read_text("utf-8")).get(path.name)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    check_world(path)
    if found != expected:
        raise WeightsError(
            f"the weights {path} are damaged (SHA-256 {found[:12]}…, not {str(expected)[:12]}…): "
            f"{remedy}"
        )
    return path


def check_world(path: Path) -> None:
    """Raises WeightsError for a file that says it was pretrained on another version of the world.

    Files that cannot be read are for whoever reads their tensors to refuse.
    """
    if path.suffix != ".safetensors":
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get(TOLD, "{}"))
    except (SafetensorError, OSError):
        return
    if (version := told.get("world")) not in (None, WORLD_VERSION):
        raise WeightsError(
            f"the weights {path} were pretrained on version {version} of the miniature world, and "
            f"this is version {WORLD_VERSION}: use the ones that ship (weights = "
            f'"{told.get("name", VFM)}"), or remake them: `mfuser world pretrain vfm|vlm`'
        )
